"""The outcome of a verification, of a directory or of what is published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep._util.text import count
from nvfp4_prep.errors import VerificationError
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.problems import Problem

__all__ = ["STRUCTURE", "VerifyReport", "edited_config_lines"]

STRUCTURE = "structure: manifest, stamp, file list, sizes, headers, index"
"""What :func:`check_structure` looks at, as reports say it."""


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a verification.

    Attributes:
        path: the checkpoint.
        manifest: its manifest.
        depth: ``quick``, ``full``, ``quick with source`` or ``full with source``.
        problems: what is wrong; empty if all is well.
        checks: what was looked at, one line each.
        checked_nbytes: bytes that were read.
    """

    path: Path
    manifest: Manifest
    depth: str
    problems: tuple[Problem, ...]
    checks: tuple[str, ...]
    checked_nbytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise :class:`VerificationError` with the first problem, if there is one."""
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            raise VerificationError(
                first.what + (f" (and {count(more, 'more problem')})" if more else ""),
                where=first.where if Path(first.where).is_absolute() else f"{self.path}, {first.where}",
                expected=first.expected,
                actual=first.actual,
                next_step=self.next_step,
            )

    @property
    def next_step(self) -> str | None:
        """What to do about the problems: what helps each of them, if something does."""
        if not self.problems:
            return None
        steps = [problem.next_step for problem in self.problems]
        if None in steps:
            return "Do not serve this checkpoint: remove it and convert again."
        return " ".join(dict.fromkeys(step for step in steps if step is not None))

    def __repr__(self) -> str:
        state = "ok" if self.ok else count(len(self.problems), "problem")
        return f"<VerifyReport of {str(self.path)!r}: {state}, {self.depth}, {self.checked_nbytes} bytes read>"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "depth": self.depth,
            "checks": list(self.checks),
            "checked_nbytes": self.checked_nbytes,
            "problems": [problem.to_dict() for problem in self.problems],
            "config_edits": [edit.name for edit in self.manifest.config_edits],
            "next_step": self.next_step,
        }


def edited_config_lines(manifest: Manifest) -> list[str]:
    """Return a line that names recorded edits of ``config.json``, where there are some."""
    names = ", ".join(edit.name for edit in manifest.config_edits)
    return [f"config.json: edited since the conversion, as the manifest records: {names}"] if names else []
