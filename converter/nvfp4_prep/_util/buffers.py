"""Byte views of tensors, without numpy and without copies."""

from __future__ import annotations

import ctypes
import zlib

import torch

__all__ = ["PAGE_NBYTES", "address_of", "byte_view", "crc32_each", "empty_bytes", "same_bytes"]


PAGE_NBYTES = 4096
"""Alignment that direct I/O asks of memory, offsets and sizes."""


def empty_bytes(nbytes: int) -> torch.Tensor:
    """``uint8 [nbytes]`` of uninitialised memory that starts at a page."""
    memory = torch.empty(nbytes + PAGE_NBYTES - 1, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE_NBYTES
    return memory[begin : begin + nbytes]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable. The view keeps the tensor alive.

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
    """The CRC-32 of each expert's bytes: ``uint8 [n, ...]``, contiguous, on the CPU."""
    data, nbytes = byte_view(experts), experts[0].numel()
    return [zlib.crc32(data[row * nbytes : (row + 1) * nbytes]) for row in range(len(experts))]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two ``uint8`` tensors of one shape are equal; by words where it can, which is several times faster."""
    if a.shape != b.shape or not (a.is_contiguous() and b.is_contiguous()) or a.numel() % 8:
        return torch.equal(a, b)
    if a.storage_offset() % 8 or b.storage_offset() % 8:
        return torch.equal(a, b)
    return torch.equal(a.view(-1).view(torch.int64), b.view(-1).view(torch.int64))
