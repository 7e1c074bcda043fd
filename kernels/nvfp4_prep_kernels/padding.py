"""Zero padding of matrices, and proof on the way back that the padding was zero."""

from __future__ import annotations

import torch

from nvfp4_prep_kernels.memory import Empty, new_empty

__all__ = ["pad_matrix", "roundup", "unpad_matrix"]


def roundup(value: int, alignment: int) -> int:
    """Return the smallest multiple of ``alignment`` that is at least ``value``."""
    return -(-value // alignment) * alignment


def pad_matrix(matrix: torch.Tensor, rows: int, cols: int, empty: Empty = new_empty) -> torch.Tensor:
    """Append zero rows and columns; return the tensor itself when nothing is missing.

    Args:
        matrix: ``[..., R, C]`` of one-byte elements.
        rows, cols: wanted size, ``rows >= R`` and ``cols >= C``.
        empty: makes the result's memory.

    Returns:
        ``[..., rows, cols]``.

    Raises:
        ValueError: if the matrix is larger than the wanted size.
    """
    *lead, have_rows, have_cols = matrix.shape
    if have_rows > rows or have_cols > cols:
        raise ValueError(f"a [{have_rows}, {have_cols}] matrix cannot be padded to [{rows}, {cols}]")
    if (have_rows, have_cols) == (rows, cols):
        return matrix
    padded = empty((*lead, rows, cols), matrix)
    padded[..., have_rows:, :] = 0
    padded[..., :have_rows, have_cols:] = 0
    padded[..., :have_rows, :have_cols] = matrix
    return padded


def unpad_matrix(matrix: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return the inverse of :func:`pad_matrix`, which refuses padding that is not zero.

    Args:
        matrix: ``[..., R, C]`` of ``uint8``.
        rows, cols: size without padding.

    Returns:
        ``[..., rows, cols]``, a view.

    Raises:
        ValueError: if a padding byte is not zero.
    """
    if bool(matrix[..., rows:, :].any()) or bool(matrix[..., :rows, cols:].any()):
        raise ValueError(f"padding outside [{rows}, {cols}] is not zero")
    return matrix[..., :rows, :cols]
