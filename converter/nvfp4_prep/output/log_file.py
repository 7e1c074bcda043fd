"""The file of ``--log-file``: appended to if it is a log of ours, made if nothing is there, and refused otherwise."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TextIO

from nvfp4_prep.errors import UsageError
from nvfp4_prep.output.report_file import check_place

__all__ = ["LOG_MARKER", "open_log"]

LOG_MARKER = "# log of nvfp4-prep\n"
"""The first line of every log: a file with it may be appended to."""

_OPTION = "--log-file"


def open_log(path: Path, *directories: str | Path | None) -> TextIO:
    """Open a log for appending.

    Args:
        path: what the user named.
        directories: checkpoints that nothing is added to, as for :func:`check_place`.

    Raises:
        UsageError: if the path lies in a checkpoint, is taken by anything but an earlier log, or cannot be written.
    """
    try:
        check_place(path, directories, _OPTION)
        descriptor = _open(path)
    except OSError as error:
        raise UsageError(
            f"{_OPTION}: cannot be written ({error.strerror})", where=str(path), next_step="Give another path."
        ) from error
    return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def _open(path: Path) -> int:
    """Return a descriptor of the log at ``path``; nothing is changed if it is something else."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return _open_earlier(path, flags)
    try:
        if os.write(descriptor, LOG_MARKER.encode()) < len(LOG_MARKER):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:  # without its first line the next run would take it for somebody else's
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _open_earlier(path: Path, flags: int) -> int:
    refused = UsageError(
        f"{_OPTION}: exists and is not a log of nvfp4-prep: nothing is overwritten",
        where=str(path),
        next_step="Give another path.",
    )
    if not stat.S_ISREG(path.lstat().st_mode):
        raise refused
    descriptor = os.open(path, flags)
    marker = LOG_MARKER.encode()
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or os.pread(descriptor, len(marker), 0) != marker:
        os.close(descriptor)
        raise refused
    return descriptor
