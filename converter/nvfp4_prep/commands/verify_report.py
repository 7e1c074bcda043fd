"""The outcome of a verification, of a directory or of what is published."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep._util.layer_strip import LayerCell
from nvfp4_prep._util.notebook import notebook_html
from nvfp4_prep._util.text import and_more, count
from nvfp4_prep.errors import VerificationError
from nvfp4_prep.prepared.manifest import LayerRecord, Manifest
from nvfp4_prep.prepared.problems import FOREIGN, Problem, steps_for

__all__ = ["STRUCTURE", "CheckFinding", "VerifyReport", "edited_config_lines"]

STRUCTURE = "structure: manifest, stamp, file list, sizes, headers, index"
"""What :func:`check_structure` looks at, as reports say it."""


_NOT_RUN = {
    "files": "--quick leaves out the digests of the files",
    "experts": "--quick leaves out the inversion of every expert",
    "scales": "--quick leaves out the computation of the scale vectors",
    "source": "no source was given (--source)",
}
"""Checks that a verification may leave out, and why it did."""
_DELETE = "Delete from the repository what is not part of the checkpoint."
_PUSH = "Push it again from a directory that nvfp4-prep verify passes."
_NOT_RUN_PUBLISHED = {
    "experts": "needs the bytes: verify a download",
    "scales": "needs the bytes: verify a download",
    "source": "needs the bytes: verify a download",
}


@dataclass(frozen=True)
class CheckFinding:
    """One check of a verification.

    Attributes:
        name: ``structure``, ``files``, ``experts``, ``scales``, ``source``, ``published`` or ``config.json``.
        figures: what was looked at, in words; of a check that was left out, why.
        problems: how many it found; ``None`` if it was left out.
    """

    name: str
    figures: str
    problems: int | None

    @property
    def passed(self) -> bool:
        """Whether the check ran and found nothing wrong."""
        return self.problems == 0

    @property
    def state(self) -> str:
        """The outcome in words."""
        return "not run" if self.problems is None else "passed" if self.passed else "FAILED"


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
        manifest_sha256: digest of the manifest's bytes.
    """

    path: Path
    manifest: Manifest
    depth: str
    problems: tuple[Problem, ...]
    checks: tuple[str, ...]
    checked_nbytes: int
    manifest_sha256: str = ""

    @property
    def findings(self) -> tuple[CheckFinding, ...]:
        """Every check, those that were left out too."""
        wrong = Counter(problem.check for problem in self.problems)
        ran = [line.partition(": ") for line in self.checks]
        found = [CheckFinding(name, figures, wrong[name]) for name, _, figures in ran]
        left_out = _NOT_RUN_PUBLISHED if self.depth == "published" else _NOT_RUN
        names = {finding.name for finding in found}
        return (*found, *(CheckFinding(name, why, None) for name, why in left_out.items() if name not in names))

    @property
    def layer_problems(self) -> tuple[tuple[LayerRecord, tuple[Problem, ...]], ...]:
        """Every prepared layer, with the problems that name one of its tensors or files."""

        def concerns(problem: Problem, layer: LayerRecord) -> bool:
            named = f"{problem.where} {problem.what}"
            return layer.experts_path in named or any(name in named for name in layer.files)

        return tuple(
            (layer, tuple(problem for problem in self.problems if concerns(problem, layer)))
            for layer in self.manifest.layers
        )

    def layer_nbytes(self, layer: LayerRecord) -> int:
        """Return the size of a layer's files."""
        return sum(self.manifest.files[name].nbytes for name in layer.files if name in self.manifest.files)

    @property
    def layer_cells(self) -> tuple[LayerCell, ...]:
        """The picture's cells: one a layer, with its number."""
        return tuple(
            LayerCell(
                str(layer.index),
                "bad" if problems else "good",
                f"{layer.experts_path}: {count(len(problems), 'problem') if problems else 'nothing wrong'}",
            )
            for layer, problems in self.layer_problems
        )

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise :class:`VerificationError` with the first problem, if there is one."""
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            raise VerificationError(
                first.what + and_more(more, "problem"),
                where=first.where if Path(first.where).is_absolute() else f"{self.path}, {first.where}",
                expected=first.expected,
                actual=first.actual,
                next_step=self.next_step,
            )

    @property
    def next_step(self) -> str | None:
        """What to do about the problems: what helps each of them, if something does."""
        if not self.problems or self.depth != "published":
            return steps_for(self.problems, self.manifest.files, str(self.path))
        foreign = [problem.next_step == FOREIGN for problem in self.problems]
        return " ".join(["Do not serve this checkpoint.", *[_DELETE] * any(foreign), *[_PUSH] * (not all(foreign))])

    def __repr__(self) -> str:
        state = "ok" if self.ok else count(len(self.problems), "problem")
        return f"<VerifyReport of {str(self.path)!r}: {state}, {self.depth}, {self.checked_nbytes} bytes read>"

    def _repr_html_(self) -> str:
        """Return the verification as a notebook shows it."""
        found = {finding.name: f"{finding.state}: {finding.figures}" for finding in self.findings}
        shown = "; ".join(map(str, self.problems[:3]))
        state = "verified" if self.ok else f"verification FAILED, {count(len(self.problems), 'problem')}"
        return notebook_html(f"{self.path}: {state} ({self.depth})", {**found, "problems": shown}, self.layer_cells)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "depth": self.depth,
            "checks": list(self.checks),
            "checked_nbytes": self.checked_nbytes,
            "manifest_sha256": self.manifest_sha256,
            "problems": [problem.to_dict() for problem in self.problems],
            "config_edits": [edit.name for edit in self.manifest.config_edits],
            "next_step": self.next_step,
        }


def edited_config_lines(manifest: Manifest) -> list[str]:
    """Return a line that names recorded edits of ``config.json``, where there are some."""
    names = ", ".join(edit.name for edit in manifest.config_edits)
    return [f"config.json: edited since the conversion, as the manifest records: {names}"] if names else []
