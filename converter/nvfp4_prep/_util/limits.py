"""Cores and memory that this process may use: the machine's, less what its control groups withhold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["machine_memory_nbytes", "usable_cores", "usable_memory_nbytes"]

_ROOT = Path("/")
_NUMBER = re.compile("[0-9]{1,19}")
"""Of 64 bits, as the kernel prints them."""


def usable_cores(root: Path = _ROOT) -> int:
    """Return the cores that this process may use: those of its affinity, at most the quota of its control groups.

    Args:
        root: where ``proc`` and ``sys`` are mounted.

    Returns:
        At least 1. A quota that is not whole counts as the next whole number, as in Go's and Java's run times.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_words(folder / "cpu.max") for folder in _levels(root, "")]
    for folder in _levels(root, "cpu"):
        quotas.append(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))
    known = [-(-quota // period) for quota, period in map(_numbers, quotas) if quota > 0 and period > 0]
    return max(1, min([cores, *known]))


def usable_memory_nbytes(root: Path = _ROOT) -> int:
    """Return the memory that this process may use: the machine's, at most the limit of its control groups.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
    """
    limits = [_words(folder / "memory.max") for folder in _levels(root, "")]
    limits += [_words(folder / "memory.limit_in_bytes") for folder in _levels(root, "memory")]
    return min([machine_memory_nbytes(), *(nbytes for nbytes, _ in map(_numbers, limits) if nbytes > 0)])


def machine_memory_nbytes() -> int:
    """Return the memory of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _levels(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of all above it, as far as they are mounted.

    Args:
        root: where ``proc`` and ``sys`` are mounted.
        controller: of version 1; empty for version 2, where one hierarchy has them all.
    """
    groups = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
    paths = [parts[2] for parts in groups if len(parts) == 3 and parts[2] and controller in parts[1].split(",")]
    for line in _lines(root / "proc/self/mountinfo") if paths else ():
        mount, _, system = (part.split() for part in line.partition(" - "))
        if len(mount) < 5 or len(system) < 3 or system[0] != ("cgroup" if controller else "cgroup2"):
            continue
        if controller and controller not in system[2].split(","):
            continue
        top = root / mount[4].lstrip("/")
        below = os.path.relpath(paths[0], mount[3])  # a container's mount often begins at its own group
        folder = top if below.startswith("..") else Path(os.path.normpath(top / below))
        yield from (level for level in (folder, *folder.parents) if level.is_relative_to(top))


def _numbers(words: list[str]) -> tuple[int, int]:
    """Return the first two words as numbers; -1, as version 1 has it for no limit, for what is not a number."""
    first, second = (int(word) if _NUMBER.fullmatch(word) else -1 for word in [*words, "", ""][:2])
    return first, second


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    """Return a file's lines; none where there is no such file, as on another system or without control groups."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (OSError, ValueError):  # a name with a NUL is a ValueError
        return []
