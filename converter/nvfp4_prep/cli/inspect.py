"""``nvfp4-prep inspect``."""

from __future__ import annotations

import click

import nvfp4_prep
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import checkpoint_argument, common
from nvfp4_prep.cli.output import say_json, say_text, tell_address
from nvfp4_prep.cli.render import inspection_text, inspection_value

__all__ = ["inspect"]


@click.command(cls=HelpfulCommand)
@checkpoint_argument(on_hub=True)
@common
def inspect(checkpoint: str, as_json: bool, quiet: bool) -> None:
    """Describe CHECKPOINT: format, MoE layers, sizes, prepared or not, and what convert would do with it.

    Reads headers and scalars only. CHECKPOINT is a directory or a Hub id. What convert would refuse is described, not
    refused: the exit code is 0 then too, and --json has the reason as "refusal".

    \b
    nvfp4-prep inspect ./DeepSeek-NVFP4
    nvfp4-prep inspect nvidia/Kimi-K2.5-NVFP4 --json
    """
    tell_address(checkpoint, quiet=quiet)
    found = nvfp4_prep.inspect(checkpoint)
    if as_json:
        say_json(inspection_value(found))
    else:
        say_text(inspection_text(found))
