"""Byte views of tensors, without numpy and without copies."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from nvfp4_prep_kernels.memory import new_empty

__all__ = [
    "PAGE_NBYTES",
    "BufferPool",
    "address_of",
    "buffers_kept",
    "byte_view",
    "contiguous",
    "crc32_each",
    "empty_bytes",
    "empty_like_pooled",
    "same_bytes",
]


PAGE_NBYTES = 4096
"""Alignment that direct I/O asks of memory, offsets and sizes."""
_HUGE_PAGE_NBYTES = 2 * 2**20


class BufferPool:
    """Memory for large tensors, kept for the next one instead of being returned to the system.

    A fresh mapping is zeroed by the kernel, and mapped and unmapped page by page under locks that all threads of a
    process share; memory that was used before costs nothing. A buffer comes back when the last tensor or view of its
    storage is gone. Large ones ask for huge pages.

    Peak memory: what is in use; beside it buffers that wait for their next use, as long as both together stay below
    the limit.
    """

    def __init__(self) -> None:
        self._limit_nbytes = 0
        self._used_nbytes = 0
        self._kept_nbytes = 0
        self._free: dict[int, list[mmap.mmap]] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """Return uninitialized, page-aligned memory: ``uint8 [nbytes]``."""
        size = -(-max(nbytes, 1) // PAGE_NBYTES) * PAGE_NBYTES
        with self._lock:
            free = self._free.get(size)
            memory = free.pop() if free else None
            if memory is not None:
                self._kept_nbytes -= size
            self._used_nbytes += size
            dropped = self._trim()
        del dropped  # unmapped without the lock
        if memory is None:
            memory = _map(size)
        array = (ctypes.c_ubyte * size).from_buffer(memory)
        weakref.finalize(array, self._give, memory).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)

    @property
    def kept_nbytes(self) -> int:
        """Memory that waits for its next use."""
        return self._kept_nbytes

    @contextmanager
    def limit_raised(self, nbytes: int) -> Iterator[None]:
        """Raise the limit meanwhile; runs that raise it at the same time add up."""
        self._change_limit(nbytes)
        try:
            yield
        finally:
            self._change_limit(-nbytes)

    def _change_limit(self, nbytes: int) -> None:
        with self._lock:
            self._limit_nbytes += nbytes
            dropped = self._trim()
        del dropped

    def _give(self, memory: mmap.mmap) -> None:
        size = len(memory)
        with self._lock:
            self._used_nbytes -= size
            if self._used_nbytes + self._kept_nbytes + size > self._limit_nbytes:
                return  # unmapped with its last reference
            self._kept_nbytes += size
            self._free.setdefault(size, []).append(memory)

    def _trim(self) -> list[mmap.mmap]:
        """Take the largest free buffers out until all memory is below the limit."""
        dropped = []
        while self._kept_nbytes and self._used_nbytes + self._kept_nbytes > self._limit_nbytes:
            size = max(size for size, free in self._free.items() if free)
            dropped.append(self._free[size].pop())
            self._kept_nbytes -= size
        return dropped


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    if size >= _HUGE_PAGE_NBYTES:
        with contextlib.suppress(AttributeError, OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


_POOL = BufferPool()


def buffers_kept(nbytes: int) -> AbstractContextManager[None]:
    """Keep memory of :func:`empty_bytes` for its next use meanwhile, as long as all of it is below ``nbytes``."""
    return _POOL.limit_raised(nbytes)


def empty_bytes(nbytes: int) -> torch.Tensor:
    """Return uninitialized memory that starts at a page: ``uint8 [nbytes]``."""
    return _POOL.take(nbytes)


def empty_like_pooled(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Return memory of :func:`empty_bytes` for the layouts' functions: ``uint8``, on the CPU."""
    if like.dtype != torch.uint8 or like.device.type != "cpu":
        return new_empty(shape, like)
    return empty_bytes(math.prod(shape)).view(tuple(shape))


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a ``uint8`` tensor on the CPU itself, or a copy without gaps in memory of :func:`empty_bytes`."""
    return tensor if tensor.is_contiguous() else empty_like_pooled(tensor.shape, tensor).copy_(tensor)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, writable. The view keeps the tensor alive.

    Raises:
        ValueError: if the tensor is not contiguous or not on the CPU.
    """
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("only a contiguous CPU tensor has a byte view")
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def address_of(view: memoryview) -> int:
    """Return the memory address of a writable view's first byte."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


def crc32_each(experts: torch.Tensor) -> list[int]:
    """Return the CRC-32 of each expert's bytes: ``uint8 [n, ...]``, contiguous, on the CPU."""
    data, nbytes = byte_view(experts), experts[0].numel()
    return [zlib.crc32(data[row * nbytes : (row + 1) * nbytes]) for row in range(len(experts))]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two ``uint8`` tensors of one shape are equal; by words where possible, several times faster."""
    if a.shape != b.shape:
        return False
    if a.is_contiguous() and b.is_contiguous():
        a, b = a.view(-1), b.view(-1)
    try:
        return torch.equal(a.view(torch.int64), b.view(torch.int64))
    except RuntimeError:  # an odd size, or rows that do not begin at a word
        return torch.equal(a, b)
