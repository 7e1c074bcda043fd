"""Zero padding and its proof."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_prep_kernels.padding import pad_matrix, roundup, unpad_matrix


@given(st.integers(0, 10_000), st.integers(1, 512))
def test_roundup_is_the_smallest_multiple(value: int, alignment: int) -> None:
    result = roundup(value, alignment)
    assert result % alignment == 0 and 0 <= result - value < alignment


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3), st.integers(0, 3))
def test_pad_appends_zeros_and_unpad_removes_them(rows: int, cols: int, more_rows: int, more_cols: int) -> None:
    matrix = torch.arange(1, 2 * rows * cols + 1, dtype=torch.uint8).reshape(2, rows, cols)
    padded = pad_matrix(matrix, rows + more_rows, cols + more_cols)
    assert padded.shape == (2, rows + more_rows, cols + more_cols)
    for e in range(2):
        for r in range(rows + more_rows):
            for c in range(cols + more_cols):
                assert padded[e, r, c] == (matrix[e, r, c] if r < rows and c < cols else 0)
    assert torch.equal(unpad_matrix(padded, rows, cols), matrix)


def test_nothing_is_copied_when_nothing_is_missing() -> None:
    matrix = torch.ones(4, 4, dtype=torch.uint8)
    assert pad_matrix(matrix, 4, 4) is matrix


def test_a_matrix_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be padded"):
        pad_matrix(torch.ones(4, 4, dtype=torch.uint8), 4, 3)


@pytest.mark.parametrize(("row", "col"), [(2, 0), (0, 3), (2, 3), (3, 4)])
def test_padding_that_is_not_zero_is_refused(row: int, col: int) -> None:
    padded = pad_matrix(torch.ones(2, 3, dtype=torch.uint8), 4, 5)
    padded[row, col] = 1
    with pytest.raises(ValueError, match="not zero"):
        unpad_matrix(padded, 2, 3)
