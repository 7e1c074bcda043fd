"""The operating system that conversions and loads need."""

from __future__ import annotations

import os
import sys

from nvfp4_prep.errors import UsageError

__all__ = ["check_linux"]

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
