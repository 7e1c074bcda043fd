"""The journal of an unfinished run, as it is read: the first line says what is written from what, each other one names
a finished file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.filenames import JOURNAL, MANIFEST, VERDICTS, WORK_FOLDER
from nvfp4_prep.checkpoint.small_files import MAX_SMALL_NBYTES
from nvfp4_prep.errors import ResumeConflictError
from nvfp4_prep.output.journal_line import LineState, read_line, tail_may_be_verdict
from nvfp4_prep.output.noted_files import noted_names
from nvfp4_prep.output.target_root import TargetRoot

__all__ = [
    "LOST_VERDICT",
    "VERDICTS_PATH",
    "Journal",
    "check_identity",
    "due_verdicts",
    "read_journal",
    "wrong_verdict",
]

_ASKED_FOR = ("command", "source", "revision", "options", "layers", "tool")
_ABOUT_FILES = ("source_files", "headers", "output")
_DIGESTS = ("headers", "output")
_ONLY_RESTART = "Only --restart helps: it discards that run and begins anew."
VERDICTS_PATH = f"{WORK_FOLDER}/{VERDICTS}"
LOST_VERDICT: Mapping[str, Any] = {"verdict": "lost"}
"""The line which says that a verdict may have stood where the journal is damaged: on any layer, and any expert."""


@dataclass(frozen=True)
class Journal:
    """A target's journal as it was read.

    Attributes:
        lines: what is believed of each line, in their order; lines of which nothing is are left out.
        identity: what the first line says is written from what; ``None`` if nothing.
        is_broken: whether nothing tells any more what the finished files were written from: the first line is damaged,
            or lines of another run follow.
        may_hide_verdict: whether a damaged line may have been the verdict of a smoke test.
        doubtful_tail: whether the last line, cut off, may have been one.
    """

    lines: tuple[dict[str, Any], ...] = ()
    identity: object = None
    is_broken: bool = False
    may_hide_verdict: bool = False
    doubtful_tail: bool = False

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read the text of a journal."""
        *complete, tail = text.split(b"\n")
        read = [read_line(line) for line in complete]
        values = tuple(line.value for line in read if line.value)
        identities = [value["identity"] for value in values if "identity" in value]
        head = read[0].value if read else None
        begun = head is not None and "identity" in head
        one_run = begun and all(_same(identities[0], other) for other in identities)
        return cls(
            lines=values,
            identity=identities[0] if begun else None,
            is_broken=not one_run or read[0].state is LineState.DAMAGED,
            may_hide_verdict=any(line.may_be_verdict for line in read),
            doubtful_tail=tail_may_be_verdict(tail),
        )


def read_journal(root: TargetRoot) -> Journal:
    """Return a target's journal, an empty one if there is none.

    A line that a kill cut off does not count; of a damaged one, as much as
    :class:`~nvfp4_prep.output.journal_line.JournalLine` leaves.

    Raises:
        TargetError: if it is a link, another kind of file or too large.
        OSError: if it cannot be read.
    """
    try:
        return Journal.parse(root.read(f"{WORK_FOLDER}/{JOURNAL}", MAX_SMALL_NBYTES))
    except FileNotFoundError:
        return Journal()


def check_identity(path: Path, journal: Journal, identity: Mapping[str, Any]) -> None:
    """Raise :class:`ResumeConflictError` if the directory's unfinished run is another one, or nothing tells which."""
    found = journal.identity
    if _same(found, identity) and all(_same(line.get("identity", found), found) for line in journal.lines):
        return  # also where only the first line's checksum is damaged
    if journal.is_broken:
        raise ResumeConflictError(
            "holds an unfinished run whose journal is damaged: nothing tells any more what was written from what",
            where=str(path),
            next_step=_ONLY_RESTART,
        )
    differences = list(_differences(found, identity))
    text = first_of(differences, 4, "; ")
    what = "holds an unfinished run of something else"
    next_step = "Repeat the first run's command to finish it, or use --restart to discard it."
    if isinstance(found, dict) and _without_files(found) == _without_files(identity):
        what = "holds an unfinished run, and the source's files changed since then"
        next_step = _ONLY_RESTART
    raise ResumeConflictError(f"{what}: {text}", where=str(path), next_step=next_step)


def _without_files(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in _ABOUT_FILES}


def _rank(key: str) -> tuple[int, str]:
    """Return a sort key: what was asked for comes before what follows from it."""
    return (_ASKED_FOR.index(key) if key in _ASKED_FOR else len(_ASKED_FOR) + (key in _ABOUT_FILES), key)


def _differences(old: object, new: object, path: str = "") -> Sequence[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}, key=str if path else _rank):
            mine, other = old.get(key), new.get(key)
            if not path and key in _DIGESTS and isinstance(mine, dict) and isinstance(other, dict):
                found += _differing_files(key, mine, other)
                continue
            found += _differences(mine, other, f"{path}.{key}" if path else str(key))
        return found
    return [] if _same(old, new) else [f"{path} was {_short(old)}, now {_short(new)}"]


def _differing_files(key: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one text for all files whose digests differ: the digests themselves say nothing to anybody."""
    names = [name for name in sorted({*old, *new}) if not _same(old.get(name), new.get(name))]
    return [f"{key} differs for {first_of(names, 1)}"] if names else []


def _same(old: object, new: object) -> bool:
    # as text: NaN is equal to itself there
    return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


def wrong_verdict(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line which says that the finished files were found wrong, and where."""
    return {**scope, "verdict": "wrong"}


def due_verdicts(journal: Journal, root: TargetRoot) -> list[dict[str, Any]]:
    """Return what a smoke test has to clear: the lines of :func:`wrong_verdict`, and :data:`LOST_VERDICT` if one may
    have been lost.

    No smoke test comes before the manifest, which stays until the run ends. So without one no line was a verdict; and
    where the journal does not name one that is there, it has lost lines. Where more verdicts were counted than there
    are lines, it has lost one of them.
    """
    due = [dict(line) for line in journal.lines if line.get("verdict") == "wrong"]
    named = MANIFEST in noted_names(journal.lines)
    there = root.status(MANIFEST) is not None
    doubtful = journal.may_hide_verdict or journal.doubtful_tail or not named
    counted = root.status(VERDICTS_PATH)
    missing = counted is not None and counted.st_size > len(due)
    if LOST_VERDICT in journal.lines or missing or (doubtful and (named or there)):
        due.append(dict(LOST_VERDICT))
    return due
