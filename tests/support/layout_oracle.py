"""The prepared layout, evaluated byte by byte in plain Python from the published index formulas.

Nothing here uses the package under test: sizes, padding, row order and swizzle are written out again from
the formulas, one byte at a time, so that a mistake in the torch code cannot hide in its own tests.
"""

from __future__ import annotations

import torch

Matrix = list[bytes]
"""Rows of one projection, as bytes."""


def up_to(value: int, multiple: int) -> int:
    """The next multiple, by counting up."""
    while value % multiple:
        value += 1
    return value


def rows_of(tensor: torch.Tensor) -> Matrix:
    """A ``uint8 [R, C]`` tensor as a list of rows."""
    return [bytes(row) for row in tensor.tolist()]


def source_row_of_w13(n: int, block: int) -> tuple[str, int]:
    """Which projection's row stands in prepared row ``n`` of a gated, interleaved w13."""
    b, j = n // (2 * block), n % (2 * block)
    return ("up", block * b + j) if j < block else ("gate", block * b + j - block)


TRTLLM_MAP = [
    *(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27),
    *(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31),
]
"""Where TRTLLM-gen puts each of 32 source rows."""


def unshuffled_row(n: int) -> int:
    """z(n): the row before TRTLLM-gen's shuffle that stands in place ``n``."""
    return 32 * (n // 32) + TRTLLM_MAP.index(n % 32)


def source_row_of_trtllm_w13(n: int) -> tuple[str, int]:
    """Which projection's row stands in prepared row ``n`` of a gated w13 for TRTLLM-gen."""
    z = unshuffled_row(n)
    return ("gate", (z - 1) // 2) if z % 2 else ("up", z // 2)


def swizzled_offset(m: int, k: int, padded_cols: int) -> int:
    """Byte offset of the scale of row ``m`` and column group ``k``."""
    return (m // 128) * (padded_cols // 4) * 512 + (k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4


def byte_at(matrix: Matrix, row: int, col: int) -> int:
    """A byte, zero outside the matrix."""
    return matrix[row][col] if row < len(matrix) and col < len(matrix[0]) else 0


def prepare_w13(
    gate: Matrix | None,
    up: Matrix,
    *,
    scale: bool,
    block: int | None,
    moe_tp: int,
    align_i: int,
    align_h: int,
    trtllm: bool = False,
) -> tuple[int, int, bytes]:
    """``(rows, bytes per row, bytes)``; ``block`` None keeps ``[gate; up]``; ``trtllm`` has no block."""
    per_byte = 16 if scale else 2
    rank_rows = len(up) // moe_tp
    padded_rank = up_to(rank_rows, align_i)
    cols = up_to(len(up[0]) * per_byte, align_h) // per_byte
    half = moe_tp * padded_rank

    def padded(matrix: Matrix, row: int, col: int) -> int:
        rank, inner = row // padded_rank, row % padded_rank
        return byte_at(matrix, rank * rank_rows + inner, col) if inner < rank_rows else 0

    rows = half if gate is None else 2 * half
    out = bytearray(rows * cols)
    for n in range(rows):
        if gate is None:
            matrix, row = up, unshuffled_row(n) if trtllm else n
        elif trtllm:
            name, row = source_row_of_trtllm_w13(n)
            matrix = up if name == "up" else gate
        elif block is None:
            matrix, row = (gate, n) if n < half else (up, n - half)
        else:
            name, row = source_row_of_w13(n, block)
            matrix = up if name == "up" else gate
        for k in range(cols):
            out[swizzled_offset(n, k, cols) if scale else n * cols + k] = padded(matrix, row, k)
    return rows, cols, bytes(out)


def prepare_w2(
    down: Matrix, *, scale: bool, moe_tp: int, align_i: int, align_h: int, trtllm: bool = False
) -> tuple[int, int, bytes]:
    """``(rows, bytes per row, bytes)`` of the down projection."""
    per_byte = 16 if scale else 2
    rank_cols = len(down[0]) // moe_tp
    padded_rank = up_to(rank_cols * per_byte, align_i) // per_byte
    rows, cols = up_to(len(down), align_h), moe_tp * padded_rank
    out = bytearray(rows * cols)
    for m in range(rows):
        row = unshuffled_row(m) if trtllm else m
        for k in range(cols):
            rank, inner = k // padded_rank, k % padded_rank
            value = byte_at(down, row, rank * rank_cols + inner) if inner < rank_cols else 0
            out[swizzled_offset(m, k, cols) if scale else m * cols + k] = value
    return rows, cols, bytes(out)
