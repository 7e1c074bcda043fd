"""Parts of a conversion: their files, their identity, and whether all of them together make the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nvfp4_prep._util.text import count, spans
from nvfp4_prep._version import __version__
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.errors import PartsMissingError, ResumeConflictError, UsageError, VerificationError
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.layer_selection import LayerSelection, list_parts
from nvfp4_prep.output.outline import Outline
from nvfp4_prep.output.target_checks import has_journal
from nvfp4_prep.pipeline.outlines import plan_outlines
from nvfp4_prep.planning.plan import OutputFile, Plan

__all__ = [
    "check_not_divided",
    "check_not_whole",
    "check_whole",
    "choose_part",
    "finished_entries",
    "part_identity",
    "part_outlines",
]

_DIVISIBLE = (FileKind.EXPERTS, FileKind.SOURCE_BLOCK_SCALES)
"""Files that parts make; all others are small and left to the join."""


def choose_part(plan: Plan, selection: LayerSelection) -> Plan:
    """Return the plan with the files of these layers alone; raises :class:`UsageError` if they are none."""
    present = [layer.index for layer in plan.layers]
    chosen = selection.choose(present)
    if not chosen:
        raise UsageError(
            f"--layers {selection.text} selects none of the MoE layers",
            where=plan.source_label,
            next_step=f"They are {spans(present)}.",
        )
    return replace(plan, files=tuple(file for file in plan.files if _layer_of(plan, file) in chosen), side_files=())


def part_identity(plan: Plan, selection: LayerSelection) -> dict[str, object]:
    """Return the identity of a part's run, which a resumed run must find again."""
    return {**plan.identity(), "tool": __version__, "layers": selection.text}


def _layer_of(plan: Plan, file: OutputFile) -> int | None:
    """Return the model's number of the layer, for a file that parts make."""
    if file.kind not in _DIVISIBLE or file.layer_position is None:
        return None
    return plan.layers[file.layer_position].index


def part_outlines(plan: Plan, selection: LayerSelection) -> dict[str, Outline]:
    """Return the outlines of a part's files by name; none if it has no layer of this plan."""
    try:
        return plan_outlines(choose_part(plan, selection))
    except UsageError:
        return {}


def check_not_divided(path: Path) -> None:
    """Raise :class:`ResumeConflictError` if parts of a conversion work there."""
    parts = list_parts(path)
    if parts:
        raise ResumeConflictError(
            f"holds parts made with --layers {', '.join(parts)}",
            where=str(path),
            next_step="Join them with --join, or discard them with --restart.",
        )


def check_not_whole(path: Path) -> None:
    """Raise :class:`ResumeConflictError` if the directory itself, not a part in it, is worked on."""
    if has_journal(path):
        raise ResumeConflictError(
            "is being converted as a whole, or joined",
            where=str(path),
            next_step="Finish that first, or give another target.",
        )


def finished_entries(parts: Mapping[Path, Mapping[str, JournalEntry]]) -> dict[str, JournalEntry]:
    """Return the journal entries of all parts' finished files by name.

    Raises:
        VerificationError: if two parts made a file with different bytes.
    """
    found: dict[str, JournalEntry] = {}
    for path, done in parts.items():
        for name, entry in done.items():
            other = found.setdefault(name, entry)
            if other.sha256 != entry.sha256:
                raise VerificationError(
                    "two parts made this file with different bytes",
                    where=name,
                    expected=f"sha256 {other.sha256}",
                    actual=f"{entry.sha256} in {path}",
                    next_step="One of the machines is broken: remove both parts and make them again elsewhere.",
                )
    return found


def check_whole(plan: Plan, entries: Mapping[str, JournalEntry], path: Path) -> None:
    """Raise :class:`PartsMissingError` if layers have files that no part finished."""
    missing = sorted(
        {layer for file in plan.files if (layer := _layer_of(plan, file)) is not None and file.name not in entries}
    )
    if missing:
        raise PartsMissingError(
            f"{len(missing)} of {count(len({layer.index for layer in plan.layers}), 'MoE layer')}"
            f" {'is' if len(missing) == 1 else 'are'} not made yet:"
            f" {spans(missing)}",
            where=str(path),
            next_step=f"Run convert with --layers {spans(missing)}, then join again.",
        )
