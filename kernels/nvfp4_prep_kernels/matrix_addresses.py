"""Addresses of the matrices of all experts, as a kernel takes them: two numbers a stack, or a table."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["MatrixAddresses", "Parts", "divisor_pow2", "find_addresses"]

Parts = torch.Tensor | Sequence[torch.Tensor]
"""One projection of all experts: stacked ``uint8 [E, rows, bytes per row]`` or E matrices of that."""


@dataclass(frozen=True)
class MatrixAddresses:
    """Addresses of the matrices of all experts and projections.

    Attributes:
        bases: address of expert 0 and bytes to the next expert for each projection, where they are stacked.
        table: int64 ``[E, projections]`` on the device, where they are not.
        row_stride: bytes between rows, the same in all matrices.
        alignment: power of two up to 16 that divides all addresses and the row stride.
        device: where the matrices are.
        keep: the tensors behind the addresses: they must live until the kernel is queued.
    """

    bases: tuple[tuple[int, int], ...] | None
    table: torch.Tensor | None
    row_stride: int
    alignment: int
    device: torch.device
    keep: tuple[Parts, ...]


def find_addresses(parts: Sequence[Parts]) -> MatrixAddresses:
    """Return the addresses of parts of one shape, copied first unless they have one row stride and whole rows."""
    row_strides = {_row_stride(part) for part in parts}
    row_stride = row_strides.pop() if len(row_strides) == 1 else None
    if row_stride is None:
        parts = [_contiguous(part) for part in parts]
        row_stride = parts[0][0].shape[1]
    device = parts[0][0].device
    alignment = divisor_pow2(16, row_stride)
    stacks = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(stacks) == len(parts):
        bases = tuple((part.data_ptr(), part.stride(0)) for part in stacks)
        alignment = functools.reduce(divisor_pow2, (number for pair in bases for number in pair), alignment)
        return MatrixAddresses(bases, None, row_stride, alignment, device, tuple(parts))
    addresses = [[part[expert].data_ptr() for part in parts] for expert in range(len(parts[0]))]
    alignment = functools.reduce(divisor_pow2, (address for row in addresses for address in row), alignment)
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return MatrixAddresses(None, table, row_stride, alignment, device, tuple(parts))


def divisor_pow2(limit: int, value: int) -> int:
    """Return the largest power of two up to ``limit``, which is one, that divides ``value``."""
    divisor = limit
    while value % divisor:
        divisor //= 2
    return divisor


def _row_stride(part: Parts) -> int | None:
    """Return bytes between rows, the same for all experts; None if they differ or the bytes of a row are apart."""
    matrices = part[:1] if isinstance(part, torch.Tensor) else part
    strides = {matrix.stride(0) if matrix.stride(1) == 1 else None for matrix in matrices}
    return strides.pop() if len(strides) == 1 else None


def _contiguous(part: Parts) -> Parts:
    return part.contiguous() if isinstance(part, torch.Tensor) else [matrix.contiguous() for matrix in part]
