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


def swizzled_offset(m: int, k: int, padded_cols: int) -> int:
    """Byte offset of the scale of row ``m`` and column group ``k``."""
    return (m // 128) * (padded_cols // 4) * 512 + (k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4


def byte_at(matrix: Matrix, row: int, col: int) -> int:
    """A byte, zero outside the matrix."""
    return matrix[row][col] if row < len(matrix) and col < len(matrix[0]) else 0


def prepare_w13(
    gate: Matrix | None, up: Matrix, *, scale: bool, block: int | None, moe_tp: int, align_i: int, align_h: int
) -> tuple[int, int, bytes]:
    """``(rows, bytes per row, bytes)``; ``block`` None keeps ``[gate; up]``."""
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
            matrix, row = up, n
        elif block is None:
            matrix, row = (gate, n) if n < half else (up, n - half)
        else:
            name, row = source_row_of_w13(n, block)
            matrix = up if name == "up" else gate
        for k in range(cols):
            out[swizzled_offset(n, k, cols) if scale else n * cols + k] = padded(matrix, row, k)
    return rows, cols, bytes(out)


def prepare_w2(down: Matrix, *, scale: bool, moe_tp: int, align_i: int, align_h: int) -> tuple[int, int, bytes]:
    """``(rows, bytes per row, bytes)`` of the down projection."""
    per_byte = 16 if scale else 2
    rank_cols = len(down[0]) // moe_tp
    padded_rank = up_to(rank_cols * per_byte, align_i) // per_byte
    rows, cols = up_to(len(down), align_h), moe_tp * padded_rank
    out = bytearray(rows * cols)
    for m in range(rows):
        for k in range(cols):
            rank, inner = k // padded_rank, k % padded_rank
            value = byte_at(down, m, rank * rank_cols + inner) if inner < rank_cols else 0
            out[swizzled_offset(m, k, cols) if scale else m * cols + k] = value
    return rows, cols, bytes(out)
