"""``nvfp4-prep doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import nvfp4_prep
from nvfp4_prep._util.printable import join_lines
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import DIRECTORY, common
from nvfp4_prep.cli.output import say_json, say_text

if TYPE_CHECKING:
    from nvfp4_prep import Diagnosis

__all__ = ["doctor"]


@click.command(cls=HelpfulCommand)
@click.argument("directory", required=False, type=DIRECTORY)
@common
def doctor(directory: Path | None, as_json: bool, quiet: bool) -> None:
    """Report what is installed and what will work; with DIRECTORY also how fast its disk is.

    Exit code 1 if nothing can be converted here.

    \b
    nvfp4-prep doctor
    nvfp4-prep doctor /scratch          writes and reads back 537 MB there
    """
    found = nvfp4_prep.diagnose(directory)
    if as_json:
        say_json(found.to_dict())
    else:
        say_text(_text(found))
    if not found.ok:
        sys.exit(1)


def _text(found: Diagnosis) -> str:
    lines = [f"{name:20} {version or 'not installed'}" for name, version in found.versions.items()]
    lines += [f"{'machine':20} {found.machine}", *(f"{'GPU':20} {card}" for card in found.cards or ("none",))]
    if found.disk is not None:
        disk = found.disk
        read = "no direct I/O" if disk.read_gb_per_s is None else f"read {disk.read_gb_per_s:.2f} GB/s past the cache"
        lines.append(
            f"{'disk':20} {disk.directory}: {format_nbytes(disk.free_nbytes)} free,"
            f" write {disk.write_gb_per_s:.2f} GB/s with fsync, {read},"
            f" {'locks' if disk.locks else 'NO locks (flock): convert, restore and relayout refuse it'}"
        )
    lines += ["", *(f"{'yes' if item.works else 'NO':4}{item.name}: {item.reason}" for item in found.abilities)]
    return join_lines(lines)
