"""``nvfp4-prep restamp``."""

from __future__ import annotations

from pathlib import Path

import click

import nvfp4_prep
from nvfp4_prep.cli.help import HelpfulCommand
from nvfp4_prep.cli.options import checkpoint_argument, common
from nvfp4_prep.cli.output import say, say_json, say_next

__all__ = ["restamp"]


@click.command(cls=HelpfulCommand)
@checkpoint_argument()
@common
def restamp(checkpoint: Path, as_json: bool, quiet: bool) -> None:
    """Keep edits of the config.json of a prepared CHECKPOINT: record them in its manifest.

    Everything but the stamp (quantization_config) may be edited: rope scaling, EOS tokens, context length. verify
    passes afterwards and names the edits, relayout keeps them, restore gives back the source's own config. Run it again
    after the next edit; a config that was put back loses its record. Only the manifest is written.

    \b
    nvfp4-prep restamp ./out
    """
    result = nvfp4_prep.restamp(checkpoint)
    if as_json:
        say_json({"path": str(result.path), "config_edits": list(result.edits), "written": result.written})
        return
    differing = f"differs from what was converted in {', '.join(result.edits)}"
    edits = differing if result.edits else "has no edits, formatting aside"
    unwritten = "recorded before in nvfp4_prep.json" if result.edits else "nothing to record"
    say(f"{result.path}: config.json {edits}; {'recorded in nvfp4_prep.json' if result.written else unwritten}")
    if not quiet:
        say_next("verify", result.path)
