"""What the tests share: checkpoints made once, and the rows that are printed at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.options import ConvertOptions
from support.serving.tiny_models import TinyModel

TABLE: list[dict[str, Any]] = []
"""Rows of test_models.py."""
REFUSALS: list[tuple[str, str]] = []
"""What was refused, and the message."""


@dataclass
class Checkpoints:
    """Sources and their prepared forms, made once a session by the real converter."""

    root: Path
    made: dict[tuple[str, str], tuple[Path, Path]] = field(default_factory=dict)

    def get(self, model: TinyModel, options: ConvertOptions | None = None) -> tuple[Path, Path]:
        """(source, prepared) of a model."""
        key = (repr(model), repr(options))
        if key not in self.made:
            folder = self.root / f"{len(self.made):03d}-{model.family}"
            source = model.write(folder / "source")
            convert(source, folder / "prepared", options)
            self.made[key] = (source, folder / "prepared")
        return self.made[key]


def table_lines() -> list[str]:
    """One line a row, as Markdown."""
    head = "| model | configuration | result | tensors compared | tensors read | expert loader calls |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in TABLE:
        read, calls = (f"{row['source'][key]} → {row['prepared'][key]}" for key in ("tensors", "calls"))
        lines.append(
            f"| {row['model']} | {row['configuration']} | {row['result']} | {row['compared']} | {read} | {calls} |"
        )
    return lines
