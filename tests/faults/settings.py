"""How much of the suite runs, and where: two environment variables."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.fault_library import missing_tool

EVERY_POINT = os.environ.get("NVFP4_PREP_FAULTS") == "all"
"""Every point of every command, as ``make test-faults`` does, instead of a few of each."""
SERVERS = min(4, os.cpu_count() or 1)
_MEMORY = Path(os.environ.get("NVFP4_PREP_FAULTS_DIR", "/dev/shm"))
"""A file system in memory, where fsync costs nothing; a disk has calls that are not made here (O_DIRECT)."""


def require_library() -> None:
    """Skip a test where the fault library cannot be built; ``make test-faults``, which is nothing else, ends."""
    reason = missing_tool()
    if reason is not None and EVERY_POINT:
        pytest.exit(f"not run: {reason}", returncode=1)
    if reason is not None:
        pytest.skip(reason)


@contextmanager
def working_folder(prefix: str) -> Iterator[Path]:
    """Return a folder for worlds, removed afterwards: in memory where that is possible."""
    where = _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=prefix, dir=where) as name:
        yield Path(name).resolve()
