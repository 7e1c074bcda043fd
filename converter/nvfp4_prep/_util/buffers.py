"""Byte views of tensors, without numpy and without copies."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
import zlib

import torch

__all__ = [
    "PAGE_NBYTES",
    "BufferPool",
    "address_of",
    "byte_view",
    "crc32_each",
    "empty_bytes",
    "keep_at_most",
    "same_bytes",
]


PAGE_NBYTES = 4096
"""Alignment that direct I/O asks of memory, offsets and sizes."""


class BufferPool:
    """Memory for large tensors, kept for the next one instead of being returned to the system.

    A fresh mapping is zeroed by the kernel page by page, at 2.5 GB/s, on every use; memory that was used before is
    written at 28 GB/s. A buffer comes back when the last tensor or view of its storage is gone.

    Peak memory: what is in use, plus at most ``keep_nbytes`` of buffers that wait for their next use.
    """

    def __init__(self, keep_nbytes: int) -> None:
        self._keep_nbytes = keep_nbytes
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
        if memory is None:
            memory = mmap.mmap(-1, size)
        array = (ctypes.c_ubyte * size).from_buffer(memory)
        weakref.finalize(array, self._give, memory).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)

    def keep_at_most(self, nbytes: int) -> None:
        """Change how much is kept from now on."""
        with self._lock:
            self._keep_nbytes = nbytes

    def _give(self, memory: mmap.mmap) -> None:
        size = len(memory)
        with self._lock:
            if self._kept_nbytes + size > self._keep_nbytes:
                return  # unmapped with its last reference
            self._kept_nbytes += size
            self._free.setdefault(size, []).append(memory)


_KEEP_NBYTES = 512 * 2**20
_POOL = BufferPool(_KEEP_NBYTES)


def keep_at_most(nbytes: int) -> None:
    """Keep no more memory for :func:`empty_bytes` than this, and never more than 512 MiB."""
    _POOL.keep_at_most(min(nbytes, _KEEP_NBYTES))


def empty_bytes(nbytes: int) -> torch.Tensor:
    """Return uninitialized memory that starts at a page: ``uint8 [nbytes]``."""
    return _POOL.take(nbytes)


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
    """Memory address of a writable view's first byte."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


def crc32_each(experts: torch.Tensor) -> list[int]:
    """Return the CRC-32 of each expert's bytes: ``uint8 [n, ...]``, contiguous, on the CPU."""
    data, nbytes = byte_view(experts), experts[0].numel()
    return [zlib.crc32(data[row * nbytes : (row + 1) * nbytes]) for row in range(len(experts))]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two ``uint8`` tensors of one shape are equal; by words where it can, which is several times faster."""
    if a.shape != b.shape or not (a.is_contiguous() and b.is_contiguous()) or a.numel() % 8:
        return torch.equal(a, b)
    if a.storage_offset() % 8 or b.storage_offset() % 8:
        return torch.equal(a, b)
    return torch.equal(a.view(-1).view(torch.int64), b.view(-1).view(torch.int64))
