"""``nvfp4-prep convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nvfp4_prep.cli.common import (
    common,
    conversion_options,
    make_options,
    make_progress,
    publishing_options,
    restart_option,
    threads_option,
)
from nvfp4_prep.cli.push import say_pushed
from nvfp4_prep.errors import UsageError

if TYPE_CHECKING:
    from nvfp4_prep.hub.push import PushResult

__all__ = ["convert"]


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing; downloads headers only.")
@click.option("--keep-source", is_flag=True, help="Download to the Hugging Face cache and leave the source there.")
@click.option("--push-to", metavar="USER/NAME", help="Publish each finished file on the Hub while the next is made.")
@click.option("--stream-out", is_flag=True, help="With --push-to: delete each file here once it is published.")
@publishing_options
@conversion_options
@threads_option
@restart_option
@common
def convert(
    source: str,
    target: Path,
    dry_run: bool,
    keep_source: bool,
    push_to: str | None,
    stream_out: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    layout: str,
    gate_up_block: str,
    gate_up_scales: str,
    moe_tp: int,
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
    """
    from nvfp4_prep import conversion
    from nvfp4_prep.hub import open_source
    from nvfp4_prep.reporting import plan_text, plan_value, relative_error_text
    from nvfp4_prep.units import format_nbytes

    options = make_options(layout, gate_up_block, gate_up_scales, moe_tp)
    _check_publishing(push_to, stream_out=stream_out, others=private or create_pr or revision is not None)
    opened = open_source(source, target=target, keep_source=keep_source)
    if dry_run:
        made = conversion.plan(opened, options)
        room = 0 if isinstance(opened, str) else opened.room_nbytes(made.shard_order(), made.peak_shards_nbytes)
        click.echo(json.dumps(plan_value(made, room)) if as_json else plan_text(made, room))
        return
    pushed: PushResult | None = None
    if push_to is None:
        result = conversion.convert(
            opened, target, options, threads=threads, progress=make_progress(quiet), restart=restart
        )
    else:
        from nvfp4_prep.hub import quiet_client
        from nvfp4_prep.hub.remote import PublishOptions
        from nvfp4_prep.hub.stream import convert_and_publish

        quiet_client()
        result, pushed = convert_and_publish(
            opened,
            target,
            push_to,
            options,
            publish_options=PublishOptions(private=private, revision=revision, create_pr=create_pr),
            stream_out=stream_out,
            threads=threads,
            progress=make_progress(quiet),
            restart=restart,
        )
    manifest = result.manifest
    if as_json:
        value = {
            "path": str(result.path),
            "already_complete": result.already_complete,
            "resumed": result.resumed,
            "written_nbytes": result.written_nbytes,
            "layers": len(manifest.layers),
            "tp_sizes": list(manifest.tp_sizes),
            "verified": [dict(check) for check in manifest.verified],
            "pushed": None if pushed is None else pushed.to_dict(),
        }
        click.echo(json.dumps(value))
        return
    if pushed is not None:
        say_pushed(pushed)
    if result.already_complete:
        click.echo(f"{result.path} is complete already: nothing to do. Check it with nvfp4-prep verify {target}")
        return
    differing = sum(layer.gate_up.differing for layer in manifest.layers)
    click.echo(
        f"{result.path}: {len(manifest.layers)} MoE layers prepared, {format_nbytes(result.written_nbytes)} written"
        f"{' (continued)' if result.resumed else ''}"
    )
    click.echo(f"serves tensor-parallel sizes {', '.join(map(str, manifest.tp_sizes)) or 'none in common'}")
    if differing:
        worst = max(
            (layer.gate_up.figures["relative_error"] for layer in manifest.layers if layer.gate_up.differing),
            key=lambda errors: float(errors[gate_up_scales]),
        )
        click.echo(
            f"gate/up global scales differed in {differing} experts ({gate_up_scales}); worst layer's"
            f" {relative_error_text(worst)}"
        )
        if gate_up_scales == "vllm":
            click.echo("warning: up's own scales are ignored as vLLM does; reconcile keeps them", err=True)
    for check in manifest.verified:
        click.echo(f"verified: {check['check']}: {check['result']}")
    click.echo(f"next: nvfp4-prep verify {target} --source {source}", err=True)


def _check_publishing(push_to: str | None, *, stream_out: bool, others: bool) -> None:
    if push_to is None and (stream_out or others):
        raise UsageError(
            "--stream-out, --private, --revision and --create-pr say how to publish, but not where",
            next_step="Add --push-to USER/NAME.",
        )
