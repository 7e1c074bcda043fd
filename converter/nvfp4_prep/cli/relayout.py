"""``nvfp4-prep relayout``."""

from __future__ import annotations

from pathlib import Path

import click

import nvfp4_prep
from nvfp4_prep._util.text import count, first_of, format_nbytes
from nvfp4_prep.checkpoint.filenames import CONFIG
from nvfp4_prep.cli.gate_up import gate_up_lines, gate_up_value, warn_of_policy
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import (
    checkpoint_argument,
    common,
    gate_up_block_option,
    layout_option,
    memory_option,
    moe_tp_option,
    restart_option,
    target_argument,
    threads_option,
)
from nvfp4_prep.cli.output import hint, make_progress, say, say_json, say_next, say_not_restarted, tell_leftovers
from nvfp4_prep.cli.render import layout_text, tp_lines
from nvfp4_prep.layouts import LAYOUTS, LayoutName

__all__ = ["relayout"]


@click.command(cls=HelpfulCommand)
@checkpoint_argument()
@target_argument
@layout_option("Kernel to prepare for.")
@gate_up_block_option()
@moe_tp_option("Tensor-parallel size to pad for.")
@threads_option
@memory_option
@restart_option
@common
def relayout(
    checkpoint: Path,
    target: Path,
    layout: LayoutName | None,
    gate_up_block: int | None,
    moe_tp: int | None,
    threads: int | None,
    memory_nbytes: int | None,
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a prepared CHECKPOINT to TARGET in another layout, without its source.

    Options that are not given keep their values.

    \b
    nvfp4-prep relayout ./out ./out2 --layout trtllm
    nvfp4-prep relayout ./out ./out16 --gate-up-block 16
    """
    with tell_leftovers(target):
        result = nvfp4_prep.relayout(
            checkpoint,
            target,
            layout=layout,
            gate_up_block=gate_up_block,
            moe_tp=moe_tp,
            threads=threads,
            memory_nbytes=memory_nbytes,
            progress=make_progress(quiet),
            restart=restart,
        )
    layers, options, sizes = result.manifest.layers, result.manifest.options.to_dict(), result.manifest.tp_sizes
    say_not_restarted(target, restart=restart, finished=result.already_complete)
    if result.other_edits:
        hint(
            f"{target / CONFIG} differs from {checkpoint / CONFIG} in recorded edits:"
            f" {first_of(result.other_edits, 4)}. To take over the checkpoint's, edit it so and run nvfp4-prep restamp."
        )
    if as_json:
        value = {"path": str(result.path), "options": options, "written_nbytes": result.written_nbytes}
        gate_up = gate_up_value(result.manifest)
        say_json({**value, "tp_sizes": list(sizes), "gate_up": gate_up, "resumed": result.resumed})
        return
    say(
        f"{result.path}: {count(len(layers), 'MoE layer')} in layout"
        f" {layout_text(options, gated=any(record.gated for record in layers))},"
        f" {format_nbytes(result.written_nbytes)} written"
        f"{' (continued)' if result.resumed else ' (was complete already)' if result.already_complete else ''}"
    )
    for line in (
        *LAYOUTS[result.manifest.options.layout].kernel_lines("relayout"),
        *tp_lines(((it.layout, it.dims) for it in layers), "relayout"),
        *gate_up_lines(result.manifest),
    ):
        say(line)
    warn_of_policy(result.manifest)
    say_next("verify", target)
