"""Row orders of prepared matrices: what distinguishes one kernel's layout from another's.

A row order is one member of :data:`RowOrder`; padding, swizzle and slices are the same for all of them. It consists
of two steps, which the Triton kernels take as two numbers:

1. the projections of w13 become one fused matrix: gate and up in alternating blocks of ``block`` rows, up first
   (:func:`~nvfp4_prep_kernels.gate_up.interleave_gate_up`), or ``[gate; up]`` (``block`` 0), or up alone;
2. with ``shuffled``, every 32 rows of w13 and of w2 are transposed as 8 x 4: fused row ``4*b + a`` of a block goes to
   place ``8*a + b``, which is TRTLLM-gen's ``[0, 8, 16, 24, 1, 9, …]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from nvfp4_prep_kernels.gate_up import deinterleave_gate_up, interleave_gate_up
from nvfp4_prep_kernels.layer_tensors import LayoutError
from nvfp4_prep_kernels.memory import Empty, new_empty

__all__ = [
    "SHUFFLE_ROWS",
    "BlockRows",
    "HalfRows",
    "PlainRows",
    "RowOrder",
    "ShuffledRows",
    "join_rows",
    "place_of_row",
    "row_at_place",
    "shuffle_rows",
    "split_rows",
    "unshuffle_rows",
]

SHUFFLE_ROWS = 32
"""Rows that TRTLLM-gen's shuffle permutes among themselves."""
_OUTER, _INNER = 8, 4


@dataclass(frozen=True)
class PlainRows:
    """One projection in source order: non-gated experts for the CuteDSL kernel."""

    gated: ClassVar[bool] = False
    block: ClassVar[int] = 0
    shuffled: ClassVar[bool] = False


@dataclass(frozen=True)
class HalfRows:
    """``[gate; up]``: the batched CuteDSL kernel."""

    gated: ClassVar[bool] = True
    block: ClassVar[int] = 0
    shuffled: ClassVar[bool] = False


@dataclass(frozen=True)
class BlockRows:
    """Gate and up in alternating blocks of 16, 32 or 64 rows, up first: gated experts for the CuteDSL kernel."""

    block: int = 64
    gated: ClassVar[bool] = True
    shuffled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block not in (16, 32, 64):
            raise LayoutError(f"gate/up block height {self.block}: must be 16, 32 or 64 rows")


@dataclass(frozen=True)
class ShuffledRows:
    """TRTLLM-gen: gate and up alternate row by row, then blocks of 32 rows are shuffled, those of w2 too."""

    gated: bool
    shuffled: ClassVar[bool] = True

    @property
    def block(self) -> int:
        """One row of up, one of gate."""
        return 1 if self.gated else 0


RowOrder = PlainRows | HalfRows | BlockRows | ShuffledRows


def row_at_place(order: RowOrder, *, fused: bool, place: int, half_rows: int) -> tuple[int, int]:
    """Return the index formula: which row stands in a prepared place.

    Args:
        fused: whether the matrix is w13, else w2.
        place: row of the prepared matrix.
        half_rows: rows of one projection, which only ``[gate; up]`` depends on.

    Returns:
        ``(half, row)``; half 0 is gate and 1 is up where there are two, else 0.
    """
    if order.shuffled:
        block, inner = divmod(place, SHUFFLE_ROWS)
        place = block * SHUFFLE_ROWS + inner % _OUTER * _INNER + inner // _OUTER
    if not (fused and order.gated):
        return 0, place
    if order.block == 0:
        return divmod(place, half_rows)
    pair, inner = divmod(place, 2 * order.block)
    return int(inner < order.block), pair * order.block + inner % order.block


def place_of_row(order: RowOrder, *, fused: bool, half: int, row: int, half_rows: int) -> int:
    """Return the inverse of :func:`row_at_place`."""
    place = row
    if fused and order.gated:
        if order.block == 0:
            place = half * half_rows + row
        else:
            block, inner = divmod(row, order.block)
            place = block * 2 * order.block + (1 - half) * order.block + inner
    if order.shuffled:
        tile, inner = divmod(place, SHUFFLE_ROWS)
        place = tile * SHUFFLE_ROWS + inner % _INNER * _OUTER + inner // _INNER
    return place


def join_rows(order: RowOrder, parts: Sequence[torch.Tensor], empty: Empty = new_empty) -> torch.Tensor:
    """Join padded projections to one matrix in this order.

    Args:
        parts: gate and up of w13 or, alone, what is not fused: up or down; ``[..., rows, cols]`` each.
        empty: makes the result's memory, where rows move.

    Returns:
        ``[..., rows of all parts, cols]``; the part itself where nothing moves.
    """
    if len(parts) == 1:
        return shuffle_rows(parts[0], empty) if order.shuffled else parts[0]
    gate, up = parts
    if order.block == 0:
        *lead, rows, cols = gate.shape
        return torch.cat((gate, up), dim=-2, out=empty((*lead, rows + up.shape[-2], cols), gate))
    if not order.shuffled:
        return interleave_gate_up(gate, up, order.block, empty)
    return _interleave_and_shuffle(gate, up, empty)


def split_rows(
    order: RowOrder, matrix: torch.Tensor, *, fused: bool, empty: Empty = new_empty
) -> tuple[torch.Tensor, ...]:
    """Return the inverse of :func:`join_rows`; ``fused`` tells whether the matrix is w13."""
    if order.shuffled:
        matrix = unshuffle_rows(matrix, empty)
    if not (fused and order.gated):
        return (matrix,)
    return tuple(matrix.chunk(2, dim=-2)) if order.block == 0 else deinterleave_gate_up(matrix, order.block, empty)


def shuffle_rows(matrix: torch.Tensor, empty: Empty = new_empty) -> torch.Tensor:
    """Move row ``4*b + a`` of every 32 to place ``8*a + b``: ``[..., rows, cols]``, contiguous."""
    return _transpose_blocks(matrix, _OUTER, _INNER, empty)


def unshuffle_rows(matrix: torch.Tensor, empty: Empty = new_empty) -> torch.Tensor:
    """Return the inverse of :func:`shuffle_rows`."""
    return _transpose_blocks(matrix, _INNER, _OUTER, empty)


def _transpose_blocks(matrix: torch.Tensor, outer: int, inner: int, empty: Empty) -> torch.Tensor:
    *lead, rows, cols = matrix.shape
    if rows % SHUFFLE_ROWS:
        raise ValueError(f"{rows} rows are not a multiple of the {SHUFFLE_ROWS} that are shuffled together")
    result = empty(matrix.shape, matrix)
    blocks = matrix.reshape(*lead, rows // SHUFFLE_ROWS, outer, inner, cols).transpose(-2, -3)
    result.view(*lead, rows // SHUFFLE_ROWS, inner, outer, cols).copy_(blocks)
    return result


def _interleave_and_shuffle(gate: torch.Tensor, up: torch.Tensor, empty: Empty) -> torch.Tensor:
    """Return both steps of :class:`ShuffledRows` in one pass over the bytes.

    Fused row ``4*b + a`` is row ``2*b + a // 2`` of up (``a`` even) or gate (odd), and goes to place ``8*a + b``.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {list(gate.shape)}, up is {up.dtype} {list(up.shape)}: must be equal")
    *lead, rows, cols = gate.shape
    half = SHUFFLE_ROWS // 2
    if rows % half:
        raise ValueError(f"{rows} rows of a projection are not a multiple of {half}")
    shape = (*lead, rows // half, _INNER // 2, 2, _OUTER, cols)
    views = [part.reshape(*lead, rows // half, _OUTER, _INNER // 2, cols).transpose(-2, -3) for part in (up, gate)]
    fused = empty((*lead, 2 * rows, cols), gate)
    torch.stack(views, dim=-3, out=fused.view(shape))
    return fused
