"""The operating system that conversions and loads need."""

from __future__ import annotations

import os
import sys
import threading

from nvfp4_prep.errors import NvfpPrepError, UsageError

__all__ = ["check_linux", "start_thread"]

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


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        NvfpPrepError: if this process may have no more of them.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise NvfpPrepError(
            "cannot start a thread: the system allows no more",
            next_step="Raise the limit of processes (ulimit -u, or the container's pids limit).",
        ) from error
