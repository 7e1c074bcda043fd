"""Commands that write a target, stopped in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep import convert, relayout, restore
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import ConversionInterrupted
from nvfp4_prep.output.target import Target

Run = Callable[..., Any]
EXPERTS = "experts-layer-00001.safetensors"
FILE_OF = {"convert": EXPERTS, "restore": "model-00002-of-", "relayout": EXPERTS}
"""Where the name of a file begins that each command writes."""


def run_of(command: str, source: Path, prepared: Path) -> Run:
    if command == "convert":
        return lambda out, **options: convert(source, out, smoke=None, **options)
    if command == "restore":
        return lambda out, **options: restore(prepared, out, **options)
    return lambda out, **options: relayout(prepared, out, gate_up_block=16, **options)


def stop(run: Run, out: Path, place: str) -> Path:
    """Run a command and stop it where it comes to a method of its target; returns the journal."""

    def stopped(self: Target) -> None:
        raise ConversionInterrupted("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, place, stopped)
        with pytest.raises(ConversionInterrupted):
            run(out)
    return out / WORK_FOLDER / "journal.jsonl"
