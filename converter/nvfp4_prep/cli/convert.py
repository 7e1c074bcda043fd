"""``nvfp4-prep convert``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nvfp4_prep.cli.common import (
    Publishing,
    common,
    conversion_options,
    make_progress,
    publishing_options,
    restart_option,
    threads_option,
    to_json,
)
from nvfp4_prep.cli.push import say_pushed
from nvfp4_prep.cli.smoke import say_smoke, smoke_after_convert
from nvfp4_prep.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from nvfp4_prep.conversion import ConvertResult
    from nvfp4_prep.hub.push import PushResult
    from nvfp4_prep.hub.source import HubSource
    from nvfp4_prep.options import ConvertOptions
    from nvfp4_prep.progress import Progress
    from nvfp4_prep.smoke import SmokeReport

__all__ = ["convert"]


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing; downloads headers only.")
@click.option("--keep-source", is_flag=True, help="Download to the Hugging Face cache and leave the source there.")
@click.option("--layers", metavar="1-20|2/8", help="One machine's part: these layers, or the second of eight shares.")
@click.option("--join", is_flag=True, help="Make the checkpoint of all parts.")
@click.option("--push-to", metavar="USER/NAME", help="Publish each finished file on the Hub while the next is made.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the layout is applied; the bytes are the same.",
)
@click.option("--no-smoke", is_flag=True, help="Leave out the fused-MoE smoke run at the end.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="HTML page about the smoke run.")
@click.option("--stream-out", is_flag=True, help="With --push-to: delete each file here once it is published.")
@publishing_options
@conversion_options
@threads_option
@restart_option
@common
def convert(
    source: str,
    target: Path,
    options: ConvertOptions,
    dry_run: bool,
    keep_source: bool,
    layers: str | None,
    join: bool,
    push_to: str | None,
    stream_out: bool,
    publishing: Publishing,
    device: str,
    no_smoke: bool,
    report: Path | None,
    threads: int | None,
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prepare the experts of SOURCE and write a checkpoint to TARGET.

    SOURCE is a directory or a Hub id: ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME. Killed at any moment, the same
    command continues and ends with the same bytes.

    \b
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out --dry-run
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out
    nvfp4-prep convert nvidia/Kimi-K2.5-NVFP4 ./out --push-to me/Kimi-K2.5-NVFP4-prepared --stream-out

    Several machines on one file system: each makes a part, then one joins them.

    \b
    nvfp4-prep convert /data/Kimi /data/out --layers 1/2        on one machine
    nvfp4-prep convert /data/Kimi /data/out --layers 2/2        on another, at the same time
    nvfp4-prep convert /data/Kimi /data/out --join              when both are done
    """
    from nvfp4_prep.hub import open_source
    from nvfp4_prep.part_folders import LayerSelection, part_folder

    publishes = stream_out or publishing != Publishing()
    _check_combination(layers, push_to, join=join, restart=restart, publishes=publishes)
    if device != "cpu" and (join or layers is not None):
        raise UsageError("parts are prepared on the CPU", next_step="Leave --device out.")
    progress = make_progress(quiet)
    selection = None if layers is None else LayerSelection.parse(layers)
    work = target if selection is None else part_folder(target, selection)
    opened = open_source(source, target=work, keep_source=keep_source)
    if dry_run:
        _show_plan(opened, options, stream_out=stream_out, as_json=as_json)
    elif selection is not None:
        _convert_part(opened, source, target, selection.text, options, threads, progress, restart, as_json)
    else:
        smoke: SmokeReport | None = None

        def passes_smoke(result: ConvertResult) -> bool:
            """Runs before anything is published in loadable form."""
            nonlocal smoke
            if no_smoke or stream_out or (result.already_complete and push_to is None):
                return True
            # a source from the Hub may be gone by now: then the prepared tensors are turned back
            smoke = smoke_after_convert(target, opened if isinstance(opened, str) else None, page=report, quiet=quiet)
            return smoke.passed

        if join:
            from nvfp4_prep.parts import join_parts

            result, pushed = join_parts(opened, target, options, threads=threads, progress=progress), None
            passes_smoke(result)
        else:
            result, pushed = _convert_whole(
                opened,
                target,
                options,
                push_to,
                publishing,
                stream_out,
                threads,
                progress,
                restart,
                device,
                passes_smoke,
            )
        if as_json:
            click.echo(to_json(_value(result, pushed) | {"smoke": None if smoke is None else smoke.summary()}))
        else:
            click.echo(_text(result, pushed, target))
            say_smoke(smoke)
        if smoke is not None and not smoke.passed:
            sys.exit(VerificationError.exit_code)
        if not as_json and not result.already_complete:
            _hint(result, source, target)


def _check_combination(layers: str | None, push_to: str | None, *, join: bool, restart: bool, publishes: bool) -> None:
    if push_to is None and publishes:
        raise UsageError(
            "--stream-out, --private, --revision and --create-pr say how to publish, but not where",
            next_step="Add --push-to USER/NAME.",
        )
    if layers is not None and join:
        raise UsageError("--layers makes one part, --join takes all", next_step="Use one of them.")
    if push_to is not None and (join or layers is not None):
        raise UsageError(
            "--push-to publishes while one machine converts, parts come from several",
            next_step="Join first, then use nvfp4-prep push.",
        )
    if join and restart:
        raise UsageError("--restart would discard what --join is to take", next_step="Leave one of them out.")


def _show_plan(opened: str | HubSource, options: ConvertOptions, *, stream_out: bool, as_json: bool) -> None:
    from nvfp4_prep.conversion import plan
    from nvfp4_prep.reporting import plan_text, plan_value

    made = plan(opened, options)
    room = 0 if isinstance(opened, str) else opened.room_nbytes(made.shard_order(), made.peak_shards_nbytes)
    sizes = {file.name: file.nbytes for file in made.files} | {file.name: file.nbytes for file in made.side_files}
    here = made.output_nbytes
    if stream_out:
        from nvfp4_prep.hub.stream import stream_room_nbytes

        here = stream_room_nbytes(sizes)
    click.echo(to_json(plan_value(made, room, here)) if as_json else plan_text(made, room, here))


def _convert_part(
    opened: str | HubSource,
    source: str,
    target: Path,
    layers: str,
    options: ConvertOptions,
    threads: int | None,
    progress: Progress,
    restart: bool,
    as_json: bool,
) -> None:
    from nvfp4_prep.parts import convert_part
    from nvfp4_prep.units import format_nbytes

    part = convert_part(opened, target, layers, options, threads=threads, progress=progress, restart=restart)
    if as_json:
        value = {"path": str(part.path), "layers": list(part.layers), "files": part.files, "resumed": part.resumed}
        click.echo(to_json({**value, "joined": part.joined, "written_nbytes": part.written_nbytes}))
    elif part.joined:
        click.echo(f"{target} is complete already: nothing to do")
    else:
        click.echo(
            f"{part.path}: part of {len(part.layers)} MoE layers ({layers}), {format_nbytes(part.written_nbytes)}"
            f" written{' (continued)' if part.resumed else ''}"
        )
        click.echo(f"next, when all parts are made: nvfp4-prep convert {source} {target} --join", err=True)


def _convert_whole(
    opened: str | HubSource,
    target: Path,
    options: ConvertOptions,
    push_to: str | None,
    publishing: Publishing,
    stream_out: bool,
    threads: int | None,
    progress: Progress,
    restart: bool,
    device: str,
    accept: Callable[[ConvertResult], bool],
) -> tuple[ConvertResult, PushResult | None]:
    if push_to is None:
        from nvfp4_prep import conversion

        result = conversion.convert(
            opened, target, options, threads=threads, progress=progress, restart=restart, device=device
        )
        accept(result)
        return result, None
    from nvfp4_prep.hub import quiet_client
    from nvfp4_prep.hub.stream import convert_and_publish

    quiet_client()
    return convert_and_publish(
        opened,
        target,
        push_to,
        options,
        publish_options=publishing.options(),
        stream_out=stream_out,
        threads=threads,
        progress=progress,
        restart=restart,
        device=device,
        accept=accept,
    )


def _value(result: ConvertResult, pushed: PushResult | None) -> dict[str, Any]:
    manifest = result.manifest
    return {
        "path": str(result.path),
        "already_complete": result.already_complete,
        "resumed": result.resumed,
        "written_nbytes": result.written_nbytes,
        "layers": len(manifest.layers),
        "tp_sizes": list(manifest.tp_sizes),
        "verified": [dict(check) for check in manifest.verified],
        "pushed": None if pushed is None else pushed.to_dict(),
    }


def _text(result: ConvertResult, pushed: PushResult | None, target: Path) -> str:
    from nvfp4_prep.reporting import relative_error_text, tp_lines
    from nvfp4_prep.units import format_nbytes

    manifest = result.manifest
    if pushed is not None:
        say_pushed(pushed)
    if result.already_complete:
        return (
            f"{result.path} is complete already: nothing to do. If nvfp4-prep verify {target} finds damage,"
            " remove it and convert again"
        )
    lines = [
        f"{result.path}: {len(manifest.layers)} MoE layers prepared, {format_nbytes(result.written_nbytes)} written"
        f"{' (continued)' if result.resumed else ''}",
        *tp_lines((record.layout, record.layer.dims) for record in manifest.layers),
    ]
    differing = sum(layer.gate_up.differing for layer in manifest.layers)
    if differing:
        policy = manifest.options.gate_up_scales.value
        worst = max(
            (layer.gate_up.figures["relative_error"] for layer in manifest.layers if layer.gate_up.differing),
            key=lambda errors: float(errors[policy]),
        )
        lines.append(
            f"gate/up global scales differed in {differing} experts ({policy}); worst layer's"
            f" {relative_error_text(worst)}"
        )
    lines += [f"verified: {check['check']}: {check['result']}" for check in manifest.verified]
    return "\n".join(lines)


def _hint(result: ConvertResult, source: str, target: Path) -> None:
    manifest = result.manifest
    ignored = manifest.options.gate_up_scales.value == "vllm" and any(
        layer.gate_up.differing for layer in manifest.layers
    )
    if ignored:
        click.echo("warning: up's own scales are ignored as vLLM does; reconcile keeps them", err=True)
    click.echo(f"next: nvfp4-prep verify {target} --source {source}", err=True)
