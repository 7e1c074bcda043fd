"""What may be touched inside a target: never anything behind a link, nor what is not a regular file or folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from nvfp4_prep.errors import TargetError

__all__ = ["check_work_folder", "read_regular", "unlink_inside"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_JOURNAL_NBYTES = 1 << 30


def check_work_folder(work: Path, files: Collection[str], folders: Collection[str]) -> None:
    """Raise :class:`TargetError` if a work folder, or an entry in it, is a link or of an unexpected type; only look.

    Args:
        work: the folder; may be missing.
        files: names that must be regular files.
        folders: names that must be folders.
    """
    try:
        mode = os.lstat(work).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    _check(work, mode, stat.S_ISDIR(mode), "a folder")
    for entry in os.scandir(work):
        mode = entry.stat(follow_symlinks=False).st_mode
        regular, folder = stat.S_ISREG(mode), stat.S_ISDIR(mode)
        path = Path(entry.path)
        if entry.name in files:
            _check(path, mode, regular, "a regular file")
        elif entry.name in folders:
            _check(path, mode, folder, "a folder")
        else:
            _check(path, mode, regular or folder, "a regular file or folder")


def _check(path: Path, mode: int, right: bool, expected: str) -> None:
    if not right:
        raise TargetError(
            "is not what nvfp4-prep makes there",
            where=str(path),
            expected=expected,
            actual="a symbolic link" if stat.S_ISLNK(mode) else f"file type {stat.S_IFMT(mode):#o}",
            next_step="Remove it, or give another target.",
        )


def unlink_inside(root: Path, name: str) -> None:
    """Remove a file below a root if it is there; never follow a link below the root."""
    *folders, last = name.split("/")
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        os.unlink(last, dir_fd=descriptor)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TargetError(
            f"cannot be removed ({error.strerror})", where=str(root / name), next_step="Look at it, then remove it."
        ) from error
    finally:
        os.close(descriptor)


def read_regular(path: Path) -> bytes:
    """Return a regular file's bytes; never follow a link, wait for a FIFO, or read without a limit."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TargetError(f"cannot be read ({error.strerror})", where=str(path)) from error
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        _check(path, status.st_mode, stat.S_ISREG(status.st_mode), "a regular file")
        if status.st_size > MAX_JOURNAL_NBYTES:
            raise TargetError("is too large", where=str(path), expected=f"at most {MAX_JOURNAL_NBYTES:,} bytes")
        return stream.read(MAX_JOURNAL_NBYTES)
