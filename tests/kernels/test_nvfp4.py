"""NVFP4 arithmetic against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep_kernels.nvfp4 import decode, decode_codes, encode_codes, quantize, round_e2m1, round_e4m3

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_value(byte: int) -> float:
    """An e4m3 byte by the definition."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 0xF, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def nearest(value: float, candidates: list[float]) -> float:
    """Nearest candidate, ties to the one with an even position."""
    distance = min(abs(candidate - abs(value)) for candidate in candidates)
    tied = [i for i, candidate in enumerate(candidates) if abs(candidate - abs(value)) == distance]
    return math.copysign(candidates[next((i for i in tied if i % 2 == 0), tied[0])], value)


def test_every_byte_of_codes() -> None:
    decoded = decode_codes(torch.arange(256, dtype=torch.uint8).unsqueeze(1))
    for byte, pair in enumerate(decoded.tolist()):
        for nibble, value in zip((byte & 15, byte >> 4), pair, strict=True):
            assert value == (-1.0 if nibble & 8 else 1.0) * E2M1[nibble & 7]


def test_every_code_with_every_scale() -> None:
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).expand(256, 8)
    values = decode(codes.contiguous(), scales)
    assert torch.equal(values.to(torch.float16).to(torch.float32).nan_to_num(), values.nan_to_num())
    for byte, row in enumerate(values.tolist()):
        for nibble, value in enumerate(row):
            expected = (-1.0 if nibble & 8 else 1.0) * E2M1[nibble & 7] * e4m3_value(byte)
            assert value == expected or (math.isnan(value) and math.isnan(expected))


@given(st.floats(-20, 20, width=32))
def test_round_e2m1(value: float) -> None:
    assert round_e2m1(torch.tensor([value])).item() == nearest(value, E2M1)


@pytest.mark.parametrize("middle", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_round_e2m1_on_both_sides_of_a_tie(middle: float, sign: int) -> None:
    places = torch.tensor([middle]).view(torch.int32) + torch.arange(-3, 4, dtype=torch.int32)
    values = places.view(torch.float32) * sign
    assert round_e2m1(values).tolist() == [nearest(value, E2M1) for value in values.tolist()]


def test_round_e2m1_ties_and_nan() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_e2m1(middles).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert round_e2m1(-middles).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    assert round_e2m1(torch.tensor([math.inf, -math.inf])).tolist() == [6.0, -6.0]
    assert round_e2m1(torch.tensor([math.nan])).isnan().all()


@given(st.floats(0, 1000, width=32))
def test_round_e4m3(value: float) -> None:
    values = [e4m3_value(byte) for byte in range(0x7F)]
    assert round_e4m3(torch.tensor([value])).item() == nearest(min(value, 448.0), values)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=32).filter(lambda codes: len(codes) % 2 == 0))
def test_encode_undoes_decode(codes: list[int]) -> None:
    packed = torch.tensor([low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)])
    packed = packed.to(torch.uint8)
    again = encode_codes(decode_codes(packed))
    assert torch.equal(decode_codes(again), decode_codes(packed))


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_quantize_is_block_by_block_what_the_formula_says(seed: int, inverse: float) -> None:
    values = torch.randn(2, 48, generator=torch.Generator().manual_seed(seed)) * 100
    values[1, 16:32] = 0
    codes, scales = quantize(values, inverse)
    for row in range(2):
        for block in range(3):
            part = values[row, 16 * block : 16 * block + 16]
            scale = scales[row, block].item()
            wanted = min(part.abs().max().item() / 6 * inverse, 448.0)
            assert abs(scale - wanted) <= max(wanted / 16, 2.0**-10) * 1.001
            for i, value in enumerate(part.tolist()):
                code = codes[row, 16 * block + i].item()
                exact = value * inverse / scale if scale else 0.0
                steps = [abs(candidate) for candidate in E2M1]
                best = min(abs(abs(exact) - candidate) for candidate in steps)
                assert abs(abs(exact) - abs(code)) <= best + 1e-4 * max(1.0, abs(exact))
