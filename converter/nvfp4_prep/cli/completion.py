"""``nvfp4-prep completion``."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.output import say_text

__all__ = ["completion"]

_CLASSES: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command(cls=HelpfulCommand)
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
    say_text(complete.source_template % complete.source_vars())
