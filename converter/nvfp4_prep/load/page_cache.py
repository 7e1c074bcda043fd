"""Whether files are in the page cache, and how to take them out of it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["cached_pages", "cached_share", "forget"]

_PROBES = 64
"""Pages of a file that are looked at."""


def cached_pages(descriptor: int, offsets: Sequence[int]) -> int:
    """Return how many of the pages at these offsets of an open file are in the page cache.

    ``mincore`` is asked about a mapping that is never touched, which brings nothing in. It calls every page cached for
    users who may not write the file, so that is made sure of by reads that must not wait; those work on local file
    systems, and alone they would not do, because the kernel begins to read what they miss. All of the pages where the
    system says neither.
    """
    cached = _in_core(descriptor, offsets)
    return cached if cached < len(offsets) else _at_once(descriptor, offsets)


def _in_core(descriptor: int, offsets: Sequence[int]) -> int:
    size = os.fstat(descriptor).st_size
    address = _libc().mmap(None, max(1, size), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        return len(offsets)
    state, cached = ctypes.c_ubyte(1), 0
    try:
        for offset in offsets:
            page = offset // mmap.PAGESIZE * mmap.PAGESIZE
            said = page < size and not _libc().mincore(address + page, 1, ctypes.byref(state))
            cached += state.value & 1 if said else 1
    finally:
        _libc().munmap(address, max(1, size))
    return cached


def _at_once(descriptor: int, offsets: Sequence[int]) -> int:
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return len(offsets)
    cached, page = 0, bytearray(1)
    for offset in offsets:
        try:
            os.preadv(descriptor, [page], offset, nowait)
            cached += 1
        except BlockingIOError:
            continue
        except OSError:
            return len(offsets)  # a file system that knows no such reads
    return cached


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library


def forget(files: Sequence[Path]) -> None:
    """Ask the system to take files out of the page cache; pages that others use stay."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_share(files: Sequence[Path]) -> float:
    """Return the share of sampled pages of files, in equal parts of each, that are in the page cache."""
    cached = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            cached += cached_pages(descriptor, [size * probe // _PROBES for probe in range(_PROBES)])
        finally:
            os.close(descriptor)
    return cached / (_PROBES * len(files))
