"""``nvfp4-prep convert``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from nvfp4_prep.cli.conversion_output import conversion_value, say_conversion, say_next
from nvfp4_prep.cli.smoke import say_smoke, set_aside, smoke_after_convert
from nvfp4_prep.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from nvfp4_prep.conversion import ConvertResult
    from nvfp4_prep.hub.push import PushResult
    from nvfp4_prep.hub.source import HubSource
    from nvfp4_prep.options import ConvertOptions
    from nvfp4_prep.progress import Progress
    from nvfp4_prep.smoke import SmokeReport

__all__ = ["convert"]


@dataclass(frozen=True)
class _Job:
    """What every kind of conversion takes."""

    opened: str | HubSource
    target: Path
    options: ConvertOptions
    threads: int | None
    progress: Progress
    restart: bool


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
    selection = None if layers is None else LayerSelection.parse(layers)
    work = target if selection is None else part_folder(target, selection)
    opened = open_source(source, target=work, keep_source=keep_source)
    job = _Job(opened, target, options, threads, make_progress(quiet), restart)
    if dry_run:
        _show_plan(job, stream_out=stream_out, as_json=as_json)
    elif selection is not None:
        _convert_part(job, selection.text, source, as_json=as_json)
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

            result, pushed = join_parts(opened, target, options, threads=threads, progress=job.progress), None
            passes_smoke(result)
        elif push_to is None:
            result, pushed = _convert_here(job, device, passes_smoke), None
        else:
            result, pushed = _convert_and_publish(job, push_to, publishing, device, passes_smoke, stream_out=stream_out)
        if as_json:
            click.echo(
                to_json(conversion_value(result, pushed) | {"smoke": None if smoke is None else smoke.summary()})
            )
        else:
            say_conversion(result, pushed, target)
            say_smoke(smoke)
        if smoke is not None and not smoke.passed:
            if push_to is None:
                set_aside(target)
            sys.exit(VerificationError.exit_code)
        if not as_json and not result.already_complete:
            say_next(result, source, target)


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


def _show_plan(job: _Job, *, stream_out: bool, as_json: bool) -> None:
    from nvfp4_prep.conversion import plan
    from nvfp4_prep.reporting import plan_text, plan_value

    opened = job.opened
    made = plan(opened, job.options)
    room = 0 if isinstance(opened, str) else opened.room_nbytes(made.shard_order(), made.peak_shards_nbytes)
    sizes = {file.name: file.nbytes for file in made.files} | {file.name: file.nbytes for file in made.side_files}
    here = made.output_nbytes
    if stream_out:
        from nvfp4_prep.hub.stream import stream_room_nbytes

        here = stream_room_nbytes(sizes)
    click.echo(to_json(plan_value(made, room, here)) if as_json else plan_text(made, room, here))


def _convert_part(job: _Job, layers: str, source: str, *, as_json: bool) -> None:
    from nvfp4_prep.parts import convert_part
    from nvfp4_prep.units import format_nbytes

    part = convert_part(
        job.opened,
        job.target,
        layers,
        job.options,
        threads=job.threads,
        progress=job.progress,
        restart=job.restart,
    )
    if as_json:
        value = {"path": str(part.path), "layers": list(part.layers), "files": part.files, "resumed": part.resumed}
        click.echo(to_json({**value, "joined": part.joined, "written_nbytes": part.written_nbytes}))
    elif part.joined:
        click.echo(f"{job.target} is complete already: nothing to do")
    else:
        click.echo(
            f"{part.path}: part of {len(part.layers)} MoE layers ({layers}), {format_nbytes(part.written_nbytes)}"
            f" written{' (continued)' if part.resumed else ''}"
        )
        click.echo(f"next, when all parts are made: nvfp4-prep convert {source} {job.target} --join", err=True)


def _convert_here(job: _Job, device: str, accept: Callable[[ConvertResult], bool]) -> ConvertResult:
    from nvfp4_prep import conversion

    result = conversion.convert(
        job.opened,
        job.target,
        job.options,
        threads=job.threads,
        progress=job.progress,
        restart=job.restart,
        device=device,
    )
    accept(result)
    return result


def _convert_and_publish(
    job: _Job,
    repository: str,
    publishing: Publishing,
    device: str,
    accept: Callable[[ConvertResult], bool],
    *,
    stream_out: bool,
) -> tuple[ConvertResult, PushResult | None]:
    from nvfp4_prep.hub import quiet_client
    from nvfp4_prep.hub.stream import convert_and_publish

    quiet_client()
    return convert_and_publish(
        job.opened,
        job.target,
        repository,
        job.options,
        publish_options=publishing.options(),
        stream_out=stream_out,
        threads=job.threads,
        progress=job.progress,
        restart=job.restart,
        device=device,
        accept=accept,
    )
