"""Checks of an output directory that only look, from outside a run; and the names in its work folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.entry_kind import FILE, entry_kind
from nvfp4_prep.checkpoint.filenames import CONFIG, JOURNAL, MANIFEST, VERDICTS, WORK_FOLDER
from nvfp4_prep.errors import NoSpaceError, TargetError
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.target_lock import LOCK
from nvfp4_prep.output.target_root import check_work_folder

__all__ = [
    "LAST_FILES",
    "PARTS_FOLDER",
    "SOURCE_FOLDER",
    "check_names",
    "check_ours",
    "check_reachable",
    "check_space",
    "check_writable",
    "file_change",
    "foreign_file",
    "has_journal",
]

LAST_FILES = (CONFIG, MANIFEST)
"""Without these a directory is not a checkpoint: every command writes them last."""
SOURCE_FOLDER = "source"
"""In the work folder: shards that a source downloads; the source itself looks after it."""
PARTS_FOLDER = "parts"
"""In the work folder: targets of their own, one for each part of a conversion by several machines."""


def has_journal(path: Path) -> bool:
    """Return whether the directory itself (not a part in it) has been worked on and is not finished."""
    return os.path.lexists(path / WORK_FOLDER / JOURNAL)


def check_ours(path: Path) -> None:
    """Raise :class:`TargetError` if the directory is neither new, empty nor one that we work in."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise TargetError("is not a directory", where=str(path), next_step="Give another target.")
    check_work_folder(path / WORK_FOLDER, (LOCK, JOURNAL, VERDICTS), (SOURCE_FOLDER, PARTS_FOLDER))
    try:
        foreign = next((entry.name for entry in os.scandir(path) if entry.name != WORK_FOLDER), None)
    except OSError as error:
        raise translate_os_error(error, path) from error
    if foreign is not None and not has_journal(path):
        raise TargetError(
            f"exists and is not empty (it has {foreign!r})",
            where=str(path),
            next_step="Give another target, or empty it yourself: nvfp4-prep never overwrites.",
        )


def check_names(path: Path, known: Collection[str]) -> None:
    """Raise :class:`TargetError` if the directory holds anything outside its work folder that is not known.

    A link, a FIFO, a socket or a device is never known: no command makes one. A folder by itself is not a finding.
    """
    for there in sorted(_entries_below(path)):
        name = there.relative_to(path).as_posix()
        try:
            mode = there.lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode) and not (stat.S_ISREG(mode) and name in known):
            raise foreign_file(there)


def _entries_below(path: Path) -> Iterator[Path]:
    """Yield everything below a directory but its work folder, in which the run's own threads make and remove."""
    for folder, folders, files in os.walk(path):
        if Path(folder) == path and WORK_FOLDER in folders:
            folders.remove(WORK_FOLDER)
        yield from (Path(folder) / name for name in (*folders, *files))


def foreign_file(path: Path) -> TargetError:
    """Return the error for a file that is not ours."""
    kind = entry_kind(path)
    what = "holds a file of something else" + ("" if kind == FILE else f" ({kind})")
    return TargetError(what, where=str(path), next_step="Move it away and run again.")


def check_reachable(path: Path) -> None:
    """Raise :class:`TargetError` if a directory above the path may not be entered; only look."""
    try:
        path.lstat()
    except PermissionError as error:
        raise _not_writable(path, f"cannot be reached ({error.strerror})") from error
    except OSError:
        return  # it is not there, or cannot be: whoever makes it says why


def check_writable(path: Path) -> None:
    """Raise :class:`TargetError` if nothing may be made in a directory, or where it will be; only look."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):  # a file is refused as one
        raise _not_writable(existing, "cannot be written")


def _not_writable(path: Path, what: str) -> TargetError:
    return TargetError(
        what,
        where=str(path),
        next_step="Check the directory's permissions and the disk, or give another target.",
    )


def check_space(path: Path, needed_nbytes: int, free_there_nbytes: int) -> None:
    """Raise :class:`NoSpaceError` if more is needed than there is."""
    if needed_nbytes > free_there_nbytes:
        raise NoSpaceError(
            f"not enough space: {format_nbytes(needed_nbytes)} needed, {format_nbytes(free_there_nbytes)} free",
            where=str(path),
            next_step="Free disk space, or give a target on another disk.",
        )


def file_change(seen: os.stat_result | None, now: os.stat_result | None) -> str | None:
    """Return what became of a file that a run wrote or found; ``None`` if it is the same."""
    if now is None:
        return "nothing"
    if not stat.S_ISREG(now.st_mode):
        return "another kind of file"
    if seen is None or (seen.st_dev, seen.st_ino) != (now.st_dev, now.st_ino):
        return "another file"
    if seen.st_size != now.st_size:
        return f"{now.st_size} bytes"
    return None if seen.st_mtime_ns == now.st_mtime_ns else "other bytes: its modification time changed"
