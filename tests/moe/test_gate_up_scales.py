"""Reconciliation against plain Python arithmetic on every byte, and the errors against dequantized matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep.moe.gate_up_scales import Reconciled, measure, reconcile, rescale
from nvfp4_prep.moe.policy_errors import PolicyErrors
from nvfp4_prep_kernels import Projection

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
RATIOS = [1.0, 0.5, 2.0, 0.25, 0.9, 1.1, 1 / 3, 0.0625, 1e-3, 1.7]


def e4m3(byte: int) -> float:
    """The value of an e4m3fn byte by the format's definition (sign, 4 exponent bits, 3 mantissa bits, bias 7)."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


FINITE = [byte for byte in range(256) if byte & 0x7F != 0x7F]


def nearest(value: float) -> int:
    """The nearest e4m3 byte, ties to the even one, by search over all of them."""
    same_sign = [byte for byte in FINITE if bool(byte & 0x80) == (math.copysign(1, value) < 0)]
    return min(same_sign, key=lambda byte: (abs(e4m3(byte) - value), byte & 1))


@pytest.mark.parametrize("ratio", RATIOS)
def test_rescale_rounds_every_byte_to_the_nearest(ratio: float) -> None:
    small = [byte for byte in FINITE if abs(e4m3(byte)) * ratio <= 448]
    made = rescale(torch.tensor(small, dtype=torch.uint8), ratio, 1.0)
    assert made is not None
    assert made.tolist() == [nearest(e4m3(byte) * ratio) for byte in small]


def test_rescale_refuses_what_would_not_fit() -> None:
    largest = torch.tensor([0x7E], dtype=torch.uint8)
    assert rescale(largest, 1.0001, 1.0) is None
    assert rescale(largest, 1.0, 1.0) is not None
    assert rescale(largest, 1.0, 0.0) is None
    assert rescale(torch.tensor([0x7D], dtype=torch.uint8), 1.0001, 1.0) is not None


def scales(*values: int, rows: int = 1) -> torch.Tensor:
    return torch.tensor([values] * rows, dtype=torch.uint8)


def test_powers_of_two_are_exact() -> None:
    outcome = reconcile(scales(0x40, 0x7E), scales(0x41, 0x7D), 2.0, 1.0)
    assert (outcome.side, outcome.global_scale) == (Projection.UP, 2.0)
    assert (outcome.rounded, outcome.underflowed, outcome.worst_relative, outcome.worst_absolute) == (0, 0, 0.0, 0.0)
    assert outcome.block_scales.tolist() == [[0x39, 0x75]]


def test_the_direction_that_rounds_less_wins() -> None:
    """Halving would underflow the smallest subnormal; doubling the other side is exact."""
    outcome = reconcile(scales(0x20, 0x28), scales(0x01, 0x20), 2.0, 1.0)
    assert (outcome.side, outcome.global_scale, outcome.rounded) == (Projection.GATE, 1.0, 0)
    # … but not where doubling would overflow
    outcome = reconcile(scales(0x7E, 0x28), scales(0x01, 0x20), 2.0, 1.0)
    assert (outcome.side, outcome.rounded, outcome.underflowed) == (Projection.UP, 1, 1)


def test_a_projection_whose_scale_is_zero() -> None:
    outcome = reconcile(scales(0x40, 0x38), scales(0x41, 0x30), 0.0, 1.0)
    assert (outcome.side, outcome.global_scale) == (Projection.GATE, 1.0)
    assert outcome.block_scales.tolist() == [[0, 0]]
    assert outcome.underflowed == 0


def random_expert(seed: int, rows: int = 8, cols: int = 64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator) for _ in range(2)]
    blocks = [torch.randint(0, 0x7F, (rows, cols // 16), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return codes, blocks


def dequantize(codes: torch.Tensor, block_scales: torch.Tensor, global_scale: float) -> list[list[float]]:
    """Plain Python, weight by weight."""
    matrix = []
    for row, scale_row in zip(codes.tolist(), block_scales.tolist(), strict=True):
        nibbles = [nibble for byte in row for nibble in (byte & 15, byte >> 4)]
        weights = [(-1 if nibble & 8 else 1) * E2M1[nibble & 7] for nibble in nibbles]
        matrix.append([w * e4m3(scale_row[k // 16]) * global_scale for k, w in enumerate(weights)])
    return matrix


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    return math.fsum((a - b) ** 2 for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@given(st.integers(0, 10**6), st.floats(1e-5, 1e-2), st.floats(1e-5, 1e-2))
@settings(max_examples=30, deadline=None)
def test_errors_equal_those_of_dequantized_matrices(seed: int, gate_scale: float, up_scale: float) -> None:
    codes, blocks = random_expert(seed)
    outcome = reconcile(blocks[0], blocks[1], gate_scale, up_scale)
    errors = measure((codes[0], codes[1]), (blocks[0], blocks[1]), (gate_scale, up_scale), outcome)
    source, reconciled, vllm = 0.0, 0.0, 0.0
    for side, code, block, own in zip(Projection, codes, blocks, (gate_scale, up_scale), strict=False):
        true = dequantize(code, block, own)
        new = outcome.block_scales if side is outcome.side else block
        source += distance(true, [[0.0] * 64] * 8)
        reconciled += distance(true, dequantize(code, new, outcome.global_scale if side is outcome.side else own))
        vllm += distance(true, dequantize(code, block, gate_scale))
    assert errors.source == pytest.approx(source, rel=1e-12)
    assert errors.reconcile == pytest.approx(reconciled, rel=1e-9, abs=source * 1e-25)
    assert errors.vllm == pytest.approx(vllm, rel=1e-9, abs=source * 1e-25)


@given(st.integers(0, 10**6), st.floats(0.2, 5.0))
@settings(max_examples=50, deadline=None)
def test_reconcile_stays_within_e4m3_rounding(seed: int, ratio: float) -> None:
    """A normal e4m3 value moves by at most half a step, 1/16 of itself; subnormals by half of 2^-9."""
    _, blocks = random_expert(seed)
    own = 1.0 / 1024
    outcome = reconcile(blocks[0], blocks[1], own, own * ratio)
    before = blocks[0] if outcome.side is Projection.GATE else blocks[1]
    old_scale = own if outcome.side is Projection.GATE else own * ratio
    for old, new in zip(before.flatten().tolist(), outcome.block_scales.flatten().tolist(), strict=True):
        exact = e4m3(old) * old_scale / outcome.global_scale
        assert abs(e4m3(new) - exact) <= max(abs(exact) / 16, 2.0**-10) * (1 + 1e-12)
    changed = [
        (e4m3(old) * old_scale, e4m3(new) * outcome.global_scale)
        for old, new in zip(before.flatten().tolist(), outcome.block_scales.flatten().tolist(), strict=True)
    ]
    assert outcome.rounded == sum(old != new for old, new in changed)
    assert outcome.underflowed == sum(new == 0 != old for old, new in changed)
    assert outcome.worst_absolute == max(abs(old - new) for old, new in changed)


def test_figures_do_not_depend_on_threads_or_order() -> None:
    codes, blocks = random_expert(1, rows=256, cols=512)
    outcome = reconcile(blocks[0], blocks[1], 1.0, 0.7)
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.add(measure((codes[0], codes[1]), (blocks[0], blocks[1]), (1.0, 0.7), outcome))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    parts = [PolicyErrors(1.0, 1e-17, 0.1), PolicyErrors(1e16, 2.0, 0.2), PolicyErrors(3.0, 1e-9, 0.3)]
    assert PolicyErrors.total(parts) == PolicyErrors.total(reversed(parts))


def test_relative_errors() -> None:
    assert PolicyErrors(4.0, 1.0, 16.0).relative() == {"source": 0.0, "reconcile": 0.5, "vllm": 2.0}
    assert PolicyErrors(0.0, 0.0, 0.0).relative() == {"source": 0.0, "reconcile": 0.0, "vllm": 0.0}


def test_views_that_are_not_contiguous(seed: int = 3) -> None:
    """Transposed stacks arrange to views."""
    codes, blocks = random_expert(seed)
    plain = reconcile(blocks[0], blocks[1], 1.0, 0.7)
    turned = [block.t().contiguous().t() for block in blocks]
    viewed: Reconciled = reconcile(turned[0], turned[1], 1.0, 0.7)
    assert torch.equal(plain.block_scales, viewed.block_scales)
    odd = [code.t().contiguous().t() for code in codes]
    assert measure((codes[0], codes[1]), (blocks[0], blocks[1]), (1.0, 0.7), plain) == measure(
        (odd[0], odd[1]), (turned[0], turned[1]), (1.0, 0.7), viewed
    )
