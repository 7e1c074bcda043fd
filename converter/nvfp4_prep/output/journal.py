"""The journal of an unfinished run, as it is read: the first line says what is written from what, each other one names
a finished file.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.filenames import JOURNAL, WORK_FOLDER, is_safe_name
from nvfp4_prep.checkpoint.small_files import MAX_SMALL_NBYTES
from nvfp4_prep.errors import ResumeConflictError
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.journal_line import parse_line
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["check_identity", "finished_files", "named_files", "read_lines", "wrong_verdict", "wrong_verdicts"]

_ASKED_FOR = ("command", "source", "revision", "options", "layers", "tool")
_ABOUT_FILES = ("source_files", "headers", "output")
_DIGESTS = ("headers", "output")


def read_lines(root: TargetRoot) -> list[dict[str, Any]]:
    """Return all lines of a target's journal, none if there is no journal.

    A line that a kill cut off does not count; of a damaged one, as much as
    :func:`~nvfp4_prep.output.journal_line.parse_line` leaves.

    Raises:
        TargetError: if it is a link, another kind of file or too large.
        OSError: if it cannot be read.
    """
    try:
        text = root.read(f"{WORK_FOLDER}/{JOURNAL}", MAX_SMALL_NBYTES)
    except FileNotFoundError:
        return []
    lines = (parse_line(line) for line in text.split(b"\n")[:-1])
    return [line for line in lines if line is not None]


def named_files(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that a run gave, or was about to give, to files of its own, finished or not."""
    found = (line.get("file", line.get("made")) for line in lines)
    return [name for name in found if isinstance(name, str) and _is_ours(name)]


def _is_ours(name: str) -> bool:
    return is_safe_name(name) and name.split("/")[0] != WORK_FOLDER


def finished_files(
    root: TargetRoot,
    lines: Iterable[Mapping[str, Any]],
    elsewhere: Callable[[str, int, str | None], bool],
    *,
    need_sha256: bool = True,
) -> dict[str, JournalEntry]:
    """Return entries of the files that are in the directory with their size, or were taken away on purpose.

    Args:
        root: the directory.
        lines: its journal's.
        elsewhere: whether a file of this name, size and sha256 was taken away.
        need_sha256: whether an entry without the file's sha256 is not enough.
    """
    done: dict[str, JournalEntry] = {}
    for line in lines:
        entry = JournalEntry.parse(line)
        if entry is None or not _is_ours(entry.file):
            if "file" in line:
                done.pop(str(line["file"]), None)  # what was said of that file before does not hold any more
            continue
        status = root.status(entry.file)
        here = status is not None and stat.S_ISREG(status.st_mode) and status.st_size == entry.nbytes
        known = entry.sha256 is not None or not need_sha256
        if known and (here or elsewhere(entry.file, entry.nbytes, entry.sha256)):
            done[entry.file] = entry
    return done


def check_identity(path: Path, found: object, identity: Mapping[str, Any]) -> None:
    """Raise :class:`ResumeConflictError` if the directory's unfinished run, ``found``, is another one."""
    if _same(found, identity):
        return
    differences = list(_differences(found, identity))
    text = first_of(differences, 4, "; ")
    what = "holds an unfinished run of something else"
    next_step = "Repeat the first run's command to finish it, or use --restart to discard it."
    if isinstance(found, dict) and _without_files(found) == _without_files(identity):
        what = "holds an unfinished run, and the source's files changed since then"
        next_step = "Only --restart helps: it discards that run and begins anew."
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


def wrong_verdicts(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of :func:`wrong_verdict`."""
    return [dict(line) for line in lines if line.get("verdict") == "wrong"]
