"""``nvfp4-prep restore``."""

from __future__ import annotations

from pathlib import Path

import click

import nvfp4_prep
from nvfp4_prep._util.text import count, format_nbytes
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import (
    checkpoint_argument,
    common,
    memory_option,
    restart_option,
    target_argument,
    threads_option,
)
from nvfp4_prep.cli.output import make_progress, say, say_json, say_not_restarted, tell_leftovers

__all__ = ["restore"]


@click.command(cls=HelpfulCommand)
@checkpoint_argument()
@target_argument
@threads_option
@memory_option
@restart_option
@common
def restore(
    checkpoint: Path,
    target: Path,
    threads: int | None,
    memory_nbytes: int | None,
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Restore the source of a prepared CHECKPOINT to TARGET: every tensor and config, bit for bit.

    A damaged CHECKPOINT is not restored: exit code 6, and TARGET holds what was written until then, without a config.
    Remove it, or give --restart once CHECKPOINT is whole.

    \b
    nvfp4-prep restore ./out ./back
    """
    with tell_leftovers(target):
        result = nvfp4_prep.restore(
            checkpoint,
            target,
            threads=threads,
            memory_nbytes=memory_nbytes,
            progress=make_progress(quiet),
            restart=restart,
        )
    say_not_restarted(target, restart=restart, finished=result.already_complete)
    if as_json:
        value = {"path": str(result.path), "tensors": result.tensors, "written_nbytes": result.written_nbytes}
        say_json({**value, "resumed": result.resumed})
        return
    say(
        f"{result.path}: {count(result.tensors, 'tensor')} restored, {format_nbytes(result.written_nbytes)} written"
        f"{' (continued)' if result.resumed else ' (was complete already)' if result.already_complete else ''}"
    )
