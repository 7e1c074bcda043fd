"""``nvfp4-prep convert``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

import nvfp4_prep
from nvfp4_prep._util.arguments import DEVICES
from nvfp4_prep.cli.conversion_output import say_checkpoint, say_failed_smoke_run, say_part, say_preview
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import (
    common,
    conversion_options,
    memory_option,
    publishing_options,
    report_option,
    restart_option,
    source_argument,
    target_argument,
    threads_option,
)
from nvfp4_prep.cli.output import hint, make_progress, say_not_restarted, tell_address
from nvfp4_prep.cli.smoke import smoke_policy
from nvfp4_prep.hub import open_source, quiet_client
from nvfp4_prep.pipeline.workers import default_memory_nbytes

if TYPE_CHECKING:
    from nvfp4_prep import ConvertRequest, ConvertResult, PushResult

__all__ = ["convert"]


@click.command(cls=HelpfulCommand)
@source_argument
@target_argument
@click.option(
    "--dry-run", is_flag=True, help="Print the plan, a lower bound of its time and the state of TARGET; write nothing."
)
@click.option("--keep-source", is_flag=True, help="Download to the Hugging Face cache and leave the source there.")
@click.option(
    "--layers", metavar="1-20|2/8", help="Convert only these layers (1-20) or shard 2 of 8, for multi-node runs."
)
@click.option("--join", is_flag=True, help="Merge the finished parts into the final checkpoint.")
@click.option("--push-to", metavar="USER/NAME", help="Publish each finished file on the Hub while the next is made.")
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="cpu",
    show_default=True,
    help="Device for the layout transform; the output is identical, and cpu was faster wherever both were measured.",
)
@click.option("--no-smoke", is_flag=True, help="Skip the fused-MoE smoke test at the end.")
@report_option("HTML page about the smoke test.")
@click.option("--stream-out", is_flag=True, help="With --push-to: delete each file here once it is published.")
@publishing_options("With --push-to: ")
@conversion_options
@threads_option
@memory_option
@restart_option
@common
def convert(
    *,
    no_smoke: bool,
    keep_source: bool,
    threads: int | None,
    memory_nbytes: int | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Prepare the experts of SOURCE and write a checkpoint to TARGET.

    SOURCE is a directory or a Hub id: ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME. If it is killed, the same
    command continues and ends with the same bytes.

    \b
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out --dry-run
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out                     for CuteDSL
    nvfp4-prep convert ./DeepSeek-NVFP4 ./out --layout trtllm     for B200 servers without flags
    nvfp4-prep convert nvidia/Kimi-K2.5-NVFP4 ./out --push-to me/Kimi-K2.5-NVFP4-prepared --stream-out

    Several machines on one file system: each makes a part, then one joins them.

    \b
    nvfp4-prep convert /data/Kimi /data/out --layers 1/2        on one machine
    nvfp4-prep convert /data/Kimi /data/out --layers 2/2        on another, at the same time
    nvfp4-prep convert /data/Kimi /data/out --join              when both are done
    """
    request = nvfp4_prep.ConvertRequest(**asked, smoke=not no_smoke)
    request.check()
    selection = request.selection
    address = str(request.source)
    tell_address(address, quiet=quiet)
    _tell_device(request, quiet=quiet)
    source = open_source(address, target=request.work_folder, keep_source=keep_source)
    running: dict[str, Any] = {
        "options": request.options,
        "threads": threads,
        "memory_nbytes": memory_nbytes,
        "progress": make_progress(quiet),
    }
    if request.dry_run:
        preview = nvfp4_prep.preview_conversion(request, source)
        say_preview(preview, request, memory_nbytes or default_memory_nbytes(threads), as_json=as_json)
        say_not_restarted(request.target, restart=request.restart, finished=preview.outlook.state == "complete")
        if preview.outlook.refusal is not None:
            sys.exit(preview.outlook.refusal.exit_code)
    elif selection is not None:
        part = nvfp4_prep.convert_part(source, request.target, selection, restart=request.restart, **running)
        say_part(part, request, as_json=as_json)
        say_not_restarted(request.target, restart=request.restart, finished=part.joined)
    else:
        try:
            result, pushed = _make_checkpoint(request, source, running, quiet=quiet)
        except nvfp4_prep.SmokeFailedError as error:
            say_failed_smoke_run(error, request, as_json=as_json)
            sys.exit(error.exit_code)
        say_checkpoint(result, pushed, request, as_json=as_json)
        say_not_restarted(request.target, restart=request.restart, finished=result.already_complete)


def _tell_device(request: ConvertRequest, *, quiet: bool) -> None:
    """Say at once that a GPU does not speed a conversion up; one that cannot be used is refused later."""
    if quiet or request.dry_run or request.device == "cpu":
        return
    import torch

    if torch.cuda.is_available():
        hint(
            f"--device {request.device}: expect a slower conversion than on the CPU, wherever both were measured;"
            " digests and the check of every byte run on the CPU in either case, and the bytes are the same"
        )


def _make_checkpoint(
    request: ConvertRequest, source: Any, running: dict[str, Any], *, quiet: bool
) -> tuple[ConvertResult, PushResult | None]:
    smoke = smoke_policy(quiet=quiet) if request.smoke else None
    if request.join:
        return nvfp4_prep.join_parts(source, request.target, smoke=smoke, **running), None
    running |= {"restart": request.restart, "device": request.device, "smoke": smoke}
    if request.push_to is None:
        return nvfp4_prep.convert(source, request.target, **running), None
    quiet_client()
    return nvfp4_prep.convert_and_publish(
        source,
        request.target,
        request.push_to,
        publish_options=request.publish_options,
        stream_out=request.stream_out,
        **running,
    )
