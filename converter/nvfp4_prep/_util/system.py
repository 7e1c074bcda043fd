"""The operating system that conversions and loads need."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading

from nvfp4_prep.errors import NvfpPrepError, OpenFilesError, UsageError

__all__ = ["check_linux", "open_files_error", "start_thread"]

_NEEDED = ("sched_getaffinity", "posix_fallocate", "posix_fadvise", "preadv", "O_DIRECT")
"""What is used of ``os`` and exists on Linux alone."""


def check_linux() -> None:
    """Raise :class:`UsageError` where the system lacks what the package is built on, before anything is imported."""
    missing = [name for name in _NEEDED if not hasattr(os, name)]
    if missing:
        raise UsageError(
            "needs Linux",
            actual=f"{sys.platform}, whose Python has no os.{missing[0]}",
            next_step="Run it on Linux; on Windows in WSL 2, on macOS in a container.",
        )


def open_files_error(error: BaseException | None, where: str | None = None) -> OpenFilesError | None:
    """Return what to raise where a process may open no more files; ``None`` for every other error.

    Args:
        error: what was caught: of the system, or of an import, which has the system's words only.
        where: the file that could not be opened, where it is of the user's.
    """
    if isinstance(error, OSError):
        found = error.errno in (errno.EMFILE, errno.ENFILE)
    else:
        found = isinstance(error, ImportError) and os.strerror(errno.EMFILE) in str(error)
    if not found:
        return None
    return OpenFilesError(
        f"cannot be opened ({os.strerror(errno.EMFILE)})" if where else os.strerror(errno.EMFILE),
        where=where,
        actual=f"a limit of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} open files for this process",
        next_step="Raise it (`ulimit -n 1024`) or close other programs; the same command resumes.",
    )


def start_thread(thread: threading.Thread, running: str = "", instead: str = "") -> None:
    """Start a thread.

    Args:
        thread: not started yet.
        running: for the error: how many of its kind run.
        instead: for the error: what helps as well as a higher limit.

    Raises:
        NvfpPrepError: if this process may have no more of them.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise NvfpPrepError(
            f"cannot start a thread: the system allows no more{running and f' ({running})'}",
            next_step=f"Raise the limit of processes (ulimit -u, or the container's pids limit){instead}.",
        ) from error
