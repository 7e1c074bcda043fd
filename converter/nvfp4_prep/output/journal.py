"""The journal of an unfinished run, as it is read: the first line says what is written from what, each other one names
a finished file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, check_bounds
from nvfp4_prep.checkpoint.filenames import is_safe_name
from nvfp4_prep.errors import ResumeConflictError
from nvfp4_prep.output.target_root import read_regular

__all__ = ["JOURNAL", "check_identity", "file_entries", "finished_files", "read_lines"]

JOURNAL = "journal.jsonl"
_ASKED_FOR = ("command", "source", "revision", "options", "layers", "tool")
_ABOUT_FILES = ("source_files", "headers", "output")


def read_lines(work: Path) -> list[dict[str, Any]]:
    """All lines of the journal in a work folder, none if there is no journal; a line that a kill cut off, or that is
    damaged, does not count.
    """
    try:
        text = read_regular(work / JOURNAL)
    except FileNotFoundError:
        return []
    lines = []
    for line in text.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            check_bounds(line, MAX_DEPTH)
            value = json.loads(line)
            if isinstance(value, dict):
                lines.append(value)
    return lines


def file_entries(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines about files whose names stay in the directory."""
    return [dict(line) for line in lines if isinstance(line.get("file"), str) and is_safe_name(line["file"])]


def finished_files(
    path: Path, lines: Iterable[Mapping[str, Any]], elsewhere: Callable[[str, int, str | None], bool]
) -> dict[str, dict[str, Any]]:
    """Entries of the files that are in the directory with their size, or were taken away on purpose."""
    done = {}
    for entry in file_entries(lines):
        name, nbytes, sha256 = entry["file"], entry.get("nbytes"), entry.get("sha256")
        here = (path / name).is_file() and (path / name).stat().st_size == nbytes
        if here or (isinstance(nbytes, int) and elsewhere(name, nbytes, sha256)):
            done[name] = entry
    return done


def check_identity(path: Path, found: object, identity: Mapping[str, Any]) -> None:
    """Raises :class:`ResumeConflictError` if the directory's unfinished run, ``found``, is another one."""
    if _same(found, identity):
        return
    differences = list(_differences(found, identity))
    text = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
    what = "holds an unfinished run of something else"
    next_step = "Repeat the first run's command to finish it, or use --restart to discard it."
    if isinstance(found, dict) and _without_files(found) == _without_files(identity):
        what = "holds an unfinished run, and the source's files changed since then"
        next_step = "Only --restart helps: it discards that run and begins anew."
    raise ResumeConflictError(f"{what}: {text}", where=str(path), next_step=next_step)


def _without_files(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if key not in _ABOUT_FILES}


def _rank(key: str) -> tuple[int, str]:
    """What was asked for comes before what follows from it."""
    return (_ASKED_FOR.index(key) if key in _ASKED_FOR else len(_ASKED_FOR) + (key in _ABOUT_FILES), key)


def _differences(old: object, new: object, path: str = "") -> Sequence[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}, key=str if path else _rank):
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if _same(old, new) else [f"{path} was {_short(old)}, now {_short(new)}"]


def _same(old: object, new: object) -> bool:
    # as text: NaN is equal to itself there
    return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
