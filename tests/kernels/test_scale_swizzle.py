"""The 128x4 swizzle against its index formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep_kernels.scale_swizzle import swizzle_scales, unswizzle_scales
from support.layout_oracle import swizzled_offset

sizes = st.tuples(st.integers(1, 3).map(lambda n: 128 * n), st.integers(1, 9).map(lambda n: 4 * n))


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_every_byte_lands_where_the_formula_says(size: tuple[int, int], seed: int) -> None:
    rows, cols = size
    scales = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    expected = bytearray(rows * cols)
    for m, row in enumerate(scales.tolist()):
        for k, value in enumerate(row):
            expected[swizzled_offset(m, k, cols)] = value
    swizzled = swizzle_scales(scales)
    assert swizzled.shape == scales.shape and swizzled.is_contiguous()
    assert bytes(swizzled.flatten().tolist()) == bytes(expected)
    assert torch.equal(unswizzle_scales(swizzled), scales)


def test_the_formula_is_a_permutation() -> None:
    offsets = {swizzled_offset(m, k, 12) for m in range(256) for k in range(12)}
    assert offsets == set(range(256 * 12))


def test_leading_dimensions_are_independent_matrices() -> None:
    scales = torch.randint(0, 256, (2, 3, 128, 8), dtype=torch.uint8)
    swizzled = swizzle_scales(scales)
    for i in range(2):
        for j in range(3):
            assert torch.equal(swizzled[i, j], swizzle_scales(scales[i, j]))
    assert torch.equal(unswizzle_scales(swizzled), scales)


def test_swizzling_twice_is_not_swizzling_once() -> None:
    scales = torch.randint(0, 256, (128, 8), dtype=torch.uint8)
    assert not torch.equal(swizzle_scales(scales), scales)
    assert not torch.equal(swizzle_scales(swizzle_scales(scales)), swizzle_scales(scales))


def test_non_contiguous_input() -> None:
    scales = torch.randint(0, 256, (8, 128), dtype=torch.uint8).t()
    assert torch.equal(swizzle_scales(scales), swizzle_scales(scales.contiguous()))
    assert torch.equal(unswizzle_scales(scales), unswizzle_scales(scales.contiguous()))


@pytest.mark.parametrize("function", [swizzle_scales, unswizzle_scales])
@pytest.mark.parametrize(
    "scales",
    [
        torch.zeros(127, 4, dtype=torch.uint8),
        torch.zeros(128, 6, dtype=torch.uint8),
        torch.zeros(128, 4, dtype=torch.int8),
    ],
)
def test_bad_input_is_refused(function: object, scales: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="scales"):
        function(scales)  # type: ignore[operator]


def test_no_rows_and_no_matrices() -> None:
    assert swizzle_scales(torch.zeros(0, 128, 4, dtype=torch.uint8)).shape == (0, 128, 4)
