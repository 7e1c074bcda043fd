"""Row order of w13 against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep_kernels.gate_up import (
    deinterleave_gate_up,
    interleave_gate_up,
    join_alternating_rows,
    split_alternating_rows,
)
from support.layout_oracle import source_row_of_w13


def pair(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(2 * rows * cols, dtype=torch.int32).reshape(2, rows, cols)
    return numbers[0], numbers[1]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([16, 32, 64]), st.integers(1, 5), st.integers(1, 7))
def test_every_row_stands_where_the_formula_says(block: int, blocks: int, cols: int) -> None:
    gate, up = pair(block * blocks, cols)
    fused = interleave_gate_up(gate, up, block)
    assert fused.shape == (2 * block * blocks, cols) and fused.is_contiguous()
    for n in range(len(fused)):
        name, row = source_row_of_w13(n, block)
        assert torch.equal(fused[n], (up if name == "up" else gate)[row])
    back_gate, back_up = deinterleave_gate_up(fused, block)
    assert torch.equal(back_gate, gate) and torch.equal(back_up, up)
    assert back_gate.is_contiguous() and back_up.is_contiguous()


def test_up_comes_first() -> None:
    gate, up = pair(128, 1)
    fused = interleave_gate_up(gate, up, 64)
    assert torch.equal(fused[:64], up[:64]) and torch.equal(fused[64:128], gate[:64])
    assert torch.equal(fused[128:192], up[64:]) and torch.equal(fused[192:], gate[64:])


def test_leading_dimensions() -> None:
    gate, up = torch.rand(3, 64, 5), torch.rand(3, 64, 5)
    fused = interleave_gate_up(gate, up, 32)
    for expert in range(3):
        assert torch.equal(fused[expert], interleave_gate_up(gate[expert], up[expert], 32))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5))
def test_alternating_rows_of_swigluoai(rows: int, cols: int) -> None:
    gate, up = pair(rows, cols)
    fused = join_alternating_rows(gate, up)
    for row in range(rows):
        assert torch.equal(fused[2 * row], gate[row]) and torch.equal(fused[2 * row + 1], up[row])
    back_gate, back_up = split_alternating_rows(fused)
    assert torch.equal(back_gate, gate) and torch.equal(back_up, up)


def test_bad_input_is_refused() -> None:
    gate, up = pair(64, 4)
    with pytest.raises(ValueError, match="block height 48"):
        interleave_gate_up(gate, up, 48)
    with pytest.raises(ValueError, match="must be equal"):
        interleave_gate_up(gate, up[:32], 32)
    with pytest.raises(ValueError, match="must be equal"):
        interleave_gate_up(gate, up.to(torch.uint8), 32)
    with pytest.raises(ValueError, match="twice the block height"):
        deinterleave_gate_up(gate, 64)
