"""Files that a journal names: which of them still are what was written, without reading those that nobody touched."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvfp4_prep._util.steps import step
from nvfp4_prep._util.text import count
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER, is_safe_name
from nvfp4_prep.errors import TargetError
from nvfp4_prep.output.atomic_file import translate_read_error
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.outline import Outline, is_cut_off
from nvfp4_prep.output.target_root import TargetRoot

__all__ = [
    "Elsewhere",
    "FileState",
    "NotedFile",
    "check_unchanged",
    "file_line",
    "finished_among",
    "foreign_line",
    "judge_files",
    "know_cut_off",
    "made_line",
    "noted_names",
]

Elsewhere = Callable[[str, int, str | None], bool]
"""Whether a file of this name, size and sha256 was taken away from the directory on purpose."""

_FOREIGN = "foreign"
_MADE = "made"
_MTIME = "mtime_ns"
_MAX_NAME_NBYTES = 255
"""Of a file or folder: no run gave a longer name to anything, and Linux refuses even to look for one."""


class FileState(enum.Enum):
    """State of a file that a journal names."""

    FINISHED = enum.auto()
    """It is what was written, or was taken away on purpose."""
    UNFINISHED = enum.auto()
    """It is ours, but has to be made again; or nothing has its name."""
    TOUCHED = enum.auto()
    """It was touched since it was written, and nothing tells whether its bytes are the same."""
    CHANGED = enum.auto()
    """It has other bytes than what was written, or is not a regular file: no run wrote it."""


@dataclass(frozen=True)
class NotedFile:
    """A file that a journal names.

    Attributes:
        name: in the directory.
        state: of what is there.
        entry: what was noted of it when it got its name; ``None`` if that is not valid.
        status: of what is there; ``None`` if nothing is.
        is_made: whether it is a small file, which a run that continues makes again in any case.
    """

    name: str
    state: FileState
    entry: JournalEntry | None = None
    status: os.stat_result | None = None
    is_made: bool = False

    @property
    def is_own(self) -> bool:
        """Whether something is there that a run wrote, and that a run may write again or remove."""
        return self.status is not None and self.state in (FileState.FINISHED, FileState.UNFINISHED)

    @property
    def may_be_cut_off(self) -> bool:
        """Whether it is a regular file that is shorter than what was written."""
        regular = self.status is not None and stat.S_ISREG(self.status.st_mode)
        shorter = self.status is not None and self.entry is not None and self.status.st_size < self.entry.nbytes
        return regular and shorter and not self.is_made


@dataclass(frozen=True)
class _Note:
    """All that the lines of a journal say of one name: the last one's entry and kind, the modification times of all."""

    entry: JournalEntry | None = None
    is_made: bool = False
    mtimes_ns: frozenset[int | None] = frozenset()


def file_line(name: str, entry: Mapping[str, Any], status: os.stat_result) -> dict[str, Any]:
    """Return the line which says that a file is finished; the entry is what the run knows of its bytes."""
    return {"file": name, "nbytes": status.st_size, **entry, _MTIME: status.st_mtime_ns}


def made_line(name: str, entry: Mapping[str, Any], status: os.stat_result) -> dict[str, Any]:
    """Return the line which says that a small file has its name: a run that continues makes it again."""
    return {_MADE: name, "nbytes": status.st_size, **entry, _MTIME: status.st_mtime_ns}


def foreign_line(name: str) -> dict[str, Any]:
    """Return the line which takes back what an earlier one says of a name: somebody else's file had it first."""
    return {_FOREIGN: name}


def judge_files(
    root: TargetRoot,
    lines: Iterable[Mapping[str, Any]],
    elsewhere: Elsewhere = lambda name, nbytes, sha256: False,
    *,
    need_sha256: bool = True,
    read: bool = True,
) -> Iterator[NotedFile]:
    """Yield the state of every file that a journal names, in the order of the names' first lines.

    A file is believed to be what was written if it has the size and the modification time that were noted. One that
    was touched, or copied without its times, is read if its sha256 was noted, when its turn comes: what is taken down
    of it then need not be found again after a kill.

    Args:
        root: the directory.
        lines: its journal's.
        elsewhere: see :data:`Elsewhere`.
        need_sha256: whether an entry without the file's sha256 is not enough.
        read: whether touched files are read; if not, those whose sha256 was noted count as finished. Small ones are
            read in any case.

    Raises:
        TargetError: if a file cannot be read.
        OSError: if a folder cannot be.
    """
    judged = [_judge(root, name, note, elsewhere, need_sha256) for name, note in _notes(lines).items()]
    doubtful = {file.name for file in judged if file.state is FileState.TOUCHED and _sha256_of(file) is not None}
    large = sum(file.name in doubtful and not file.is_made for file in judged) if read else 0
    with step(f"check the sha256 of {count(large, 'touched file')}") if large else contextlib.nullcontext():
        for file in judged:
            if file.name not in doubtful:
                yield file
            elif read or file.is_made:
                yield _prove(file, _hash(root, file.name))
            else:
                yield _prove(file, _sha256_of(file))


def finished_among(files: Iterable[NotedFile]) -> dict[str, JournalEntry]:
    """Return the entries of the finished ones by name."""
    return {file.name: file.entry for file in files if file.state is FileState.FINISHED and file.entry is not None}


def noted_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that a run gave, or was about to give, to files of its own, finished or not."""
    return list(_notes(lines))


def know_cut_off(root: TargetRoot, files: Iterable[NotedFile], outlines: Mapping[str, Outline]) -> list[NotedFile]:
    """Return the files that were judged; changed ones that are only cut off count as ours, to be made again.

    Raises:
        TargetError: if one cannot be read.
    """
    return [
        replace(file, state=FileState.UNFINISHED)
        if file.state is FileState.CHANGED and _is_cut_off(root, file, outlines)
        else file
        for file in files
    ]


def _is_cut_off(root: TargetRoot, file: NotedFile, outlines: Mapping[str, Outline]) -> bool:
    return file.may_be_cut_off and file.name in outlines and is_cut_off(root, file.name, outlines[file.name])


def check_unchanged(path: Path, files: Iterable[NotedFile]) -> None:
    """Raise :class:`TargetError` if one of the files that are judged has other bytes than what was written."""
    for file in files:
        if file.state is FileState.CHANGED:
            wanted = file.entry
            raise TargetError(
                "was changed or replaced since the unfinished run wrote it",
                where=str(path / file.name),
                expected=wanted and f"{wanted.nbytes} bytes, sha256 {wanted.sha256 or 'unknown'}",
                next_step="Move it out of the target and run the same command again.",
            )


def _notes(lines: Iterable[Mapping[str, Any]]) -> dict[str, _Note]:
    notes: dict[str, _Note] = {}
    for line in lines:
        name, foreign = line.get("file", line.get(_MADE)), line.get(_FOREIGN)
        if isinstance(foreign, str):
            notes.pop(foreign, None)
        if not isinstance(name, str) or not _is_ours(name):
            continue
        mtime_ns = line.get(_MTIME)
        known = mtime_ns if isinstance(mtime_ns, int) else None
        before = notes.get(name, _Note())
        # what was said of that file before does not hold any more, but a kill may have left it where it was
        entry = JournalEntry.parse({**line, "file": name})
        notes[name] = _Note(entry, "file" not in line, before.mtimes_ns | {known})
    return notes


def _is_ours(name: str) -> bool:
    parts = name.split("/")
    exists = is_safe_name(name) and all(len(part.encode()) <= _MAX_NAME_NBYTES for part in parts)
    return exists and parts[0] != WORK_FOLDER


def _judge(root: TargetRoot, name: str, note: _Note, elsewhere: Elsewhere, need_sha256: bool) -> NotedFile:
    entry, status = note.entry, root.status(name)
    if entry is not None and need_sha256 and entry.sha256 is None:
        entry = None
    if status is None:
        away = entry is not None and not note.is_made and elsewhere(name, entry.nbytes, entry.sha256)
        return NotedFile(name, FileState.FINISHED if away else FileState.UNFINISHED, entry, is_made=note.is_made)
    return NotedFile(name, _state_of(status, note, entry), entry, status, note.is_made)


def _state_of(status: os.stat_result, note: _Note, entry: JournalEntry | None) -> FileState:
    if not stat.S_ISREG(status.st_mode):
        return FileState.CHANGED
    whole = entry is not None and status.st_size == entry.nbytes
    if whole and entry is not None and entry.mtime_ns in (None, status.st_mtime_ns):
        return FileState.UNFINISHED if note.is_made else FileState.FINISHED
    if None in note.mtimes_ns or status.st_mtime_ns in note.mtimes_ns:  # earlier releases did not note when
        return FileState.UNFINISHED
    return FileState.TOUCHED if whole or entry is None else FileState.CHANGED


def _sha256_of(file: NotedFile) -> str | None:
    return None if file.entry is None else file.entry.sha256


def _prove(file: NotedFile, sha256: str | None) -> NotedFile:
    proved = FileState.UNFINISHED if file.is_made else FileState.FINISHED
    return replace(file, state=proved if sha256 == _sha256_of(file) else FileState.CHANGED)


def _hash(root: TargetRoot, name: str) -> str | None:
    """Return the file's sha256 in hex; ``None`` if it is not a regular file any more."""
    try:
        with open(root.open_file(name, os.O_RDONLY), "rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (TargetError, FileNotFoundError):  # a link, another kind of file, or nothing
        return None
    except OSError as error:
        raise translate_read_error(error, root.path / name) from error
