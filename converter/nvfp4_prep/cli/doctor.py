"""``nvfp4-prep doctor`` and ``nvfp4-prep completion``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from nvfp4_prep.cli.common import common, to_json

if TYPE_CHECKING:
    from nvfp4_prep.doctor import Diagnosis

__all__ = ["completion", "doctor"]

_CLASSES: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@common
def doctor(directory: Path | None, as_json: bool, quiet: bool) -> None:
    """Say what is installed here and what will work; with DIRECTORY also how fast its disk is.

    Exit code 1 if nothing can be converted here.

    \b
    nvfp4-prep doctor
    nvfp4-prep doctor /scratch          writes and reads back 537 MB there
    """
    from nvfp4_prep import doctor as diagnosing

    found = diagnosing.diagnose(directory)
    click.echo(to_json(found.to_dict()) if as_json else _text(found))
    if not found.ok:
        sys.exit(1)


def _text(found: Diagnosis) -> str:
    from nvfp4_prep.units import format_nbytes

    lines = [f"{name:20} {version or 'not installed'}" for name, version in found.versions.items()]
    lines += [f"{'machine':20} {found.machine}", *(f"{'card':20} {card}" for card in found.cards or ("none",))]
    if found.disk is not None:
        disk = found.disk
        read = "no direct I/O" if disk.read_gb_per_s is None else f"read {disk.read_gb_per_s:.2f} GB/s past the cache"
        lines.append(
            f"{'disk':20} {disk.directory}: {format_nbytes(disk.free_nbytes)} free,"
            f" write {disk.write_gb_per_s:.2f} GB/s with fsync, {read},"
            f" {'locks' if disk.locks else 'NO locks: never start two runs on one target'}"
        )
    lines += ["", *(f"{'yes' if item.works else 'NO':4}{item.name}: {item.reason}" for item in found.abilities)]
    return "\n".join(lines)


@click.command()
@click.argument("shell", type=click.Choice(list(_CLASSES)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL.

    \b
    nvfp4-prep completion bash > ~/.local/share/bash-completion/completions/nvfp4-prep
    nvfp4-prep completion zsh  > ~/.zfunc/_nvfp4-prep        (a folder in $fpath)
    nvfp4-prep completion fish > ~/.config/fish/completions/nvfp4-prep.fish
    """
    complete = _CLASSES[shell](context.find_root().command, {}, "nvfp4-prep", "_NVFP4_PREP_COMPLETE")
    click.echo(complete.source_template % complete.source_vars())
