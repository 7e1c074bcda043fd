"""Device code of :mod:`nvfp4_prep_kernels.triton_moe`; importing it needs Triton.

Plain integer and float32 arithmetic decodes e2m1 and e4m3, so that it runs on every GPU from Ampere on. ``code *
block scale`` is exact in float16, which is what the dot products take; they accumulate in float32.
"""

# Triton traces the arguments of device functions; they have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gemm_down", "gemm_gate_up"]


@triton.jit
def _e2m1(code):
    """Value of the low four bits: exponent and mantissa moved into a float16, then its bias corrected (15 - 1)."""
    bits = ((code & 8).to(tl.uint16) << 12) | ((code & 7).to(tl.uint16) << 9)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def _e4m3(byte):
    """Value of an e4m3 byte as float16: the same move, bias 15 - 7; 0x7F is NaN."""
    bits = ((byte & 0x80).to(tl.uint16) << 8) | ((byte & 0x7F).to(tl.uint16) << 7)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def _round_e4m3(value):
    """Nearest e4m3 value of a float32 that is not negative, ties to even, saturating at 448."""
    value = tl.minimum(value, 448.0)
    bits = value.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    # below 2^-6 the step is 2^-9: adding 1.5 * 2^14 leaves exactly that many bits
    subnormal = (value + 24576.0) - 24576.0
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def _round_e2m1(value):
    """Nearest e2m1 value, ties to even, saturating at 6; NaN stays NaN."""
    size = tl.abs(value)
    small = tl.where(size > 0.25, 0.5, 0.0) + tl.where(size >= 0.75, 0.5, 0.0) + tl.where(size > 1.25, 0.5, 0.0)
    large = tl.where(size >= 1.75, 0.5, 0.0) + tl.where(size > 2.5, 1.0, 0.0) + tl.where(size >= 3.5, 1.0, 0.0)
    rounded = small + large + tl.where(size > 5.0, 2.0, 0.0)
    rounded = tl.where(value < 0, -rounded, rounded)
    return tl.where(value != value, value, rounded)


@triton.jit
def _swizzled(row, col, COLS: tl.constexpr):
    """Byte of the scale of ``row`` and column group ``col`` in the 128x4 swizzle."""
    tile = row // 128 * (COLS // 4) + col // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4


@triton.jit
def _spread(scales, GROUPS: tl.constexpr, N: tl.constexpr):
    """Spread ``[GROUPS, N]`` block scales to ``[8 * GROUPS, N]``: one for each byte of two codes."""
    return tl.reshape(tl.broadcast_to(scales[:, None, :], (GROUPS, 8, N)), (GROUPS * 8, N))


@triton.jit
def _tile_pairs(sorted_pairs, block_experts, BM: tl.constexpr):
    """Return this program's tile of ``sort_pairs``: expert, pairs ``[BM]``, and which are real; the others are 0."""
    pair = tl.load(sorted_pairs + tl.program_id(0) * BM + tl.arange(0, BM))
    expert = tl.load(block_experts + tl.program_id(0)).to(tl.int64)
    real = pair >= 0
    return expert, tl.where(real, pair, 0).to(tl.int64), real


@triton.jit
def _token_tile(codes, scales, token, real, k, COLS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Even and odd columns of ``2 * BK`` columns from byte ``k`` of rows ``token [BM]``: two float16 ``[BM, BK]``."""
    place = codes + token[:, None] * (COLS // 2) + (k + tl.arange(0, BK))[None, :]
    byte = tl.load(place, mask=real[:, None], other=0)
    group = k // 8 + tl.arange(0, BK // 8)
    scale = tl.load(scales + token[:, None] * (COLS // 16) + group[None, :], mask=real[:, None], other=0)
    scale = tl.trans(_spread(tl.trans(_e4m3(scale)), BK // 8, BM))
    return _e2m1(byte) * scale, _e2m1(byte >> 4) * scale


@triton.jit
def _weight_tile(codes, scales, row, k, COLS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """Even and odd columns of ``2 * BK`` columns from byte ``k`` of rows ``row [BN]``: two float16 ``[BK, BN]``."""
    byte = tl.load(codes + (k + tl.arange(0, BK))[:, None] + row[None, :].to(tl.int64) * (COLS // 2))
    group = k // 8 + tl.arange(0, BK // 8)
    scale = _e4m3(tl.load(scales + _swizzled(row[None, :], group[:, None], COLS // 16)))
    scale = _spread(scale, BK // 8, BN)
    return _e2m1(byte) * scale, _e2m1(byte >> 4) * scale


@triton.jit
def _add_product(total, even, odd, codes, scales, row, k, COLS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """``total [BM, BN]`` plus the product of ``even`` and ``odd [BM, BK]`` with :func:`_weight_tile`."""
    # both tiles before the first product: decoding between the two costs barriers on Hopper
    w_even, w_odd = _weight_tile(codes, scales, row, k, COLS, BK, BN)
    total = tl.dot(even, w_even, total)
    return tl.dot(odd, w_odd, total)


@triton.jit
def _shuffled_place(row):
    """Place of a row in TRTLLM-gen's order: every 32 rows transposed as 8 x 4."""
    return row // 32 * 32 + row % 4 * 8 + row % 32 // 4


@triton.jit
def _gate_up_rows(channel, INTER: tl.constexpr, BLOCK: tl.constexpr, SHUFFLED: tl.constexpr, GATED: tl.constexpr):
    """Rows of the prepared w13 that hold a channel: (gate row, up row), the same one without a gate."""
    if not GATED:
        up_row = channel
        gate_row = channel
    elif BLOCK > 0:
        up_row = channel // BLOCK * (2 * BLOCK) + channel % BLOCK
        gate_row = up_row + BLOCK
    else:
        gate_row = channel
        up_row = channel + INTER
    if SHUFFLED:
        gate_row = _shuffled_place(gate_row)
        up_row = _shuffled_place(up_row)
    return gate_row, up_row


@triton.jit
def _sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def _activate(gate, up, alpha, beta, limit, situ_beta, situ_linear_beta, FUNCTION: tl.constexpr):
    """``MoeActivation`` of float32 tiles; 0 as ``situ_linear_beta`` leaves ``up`` as it is."""
    if FUNCTION == "relu2":
        hidden = tl.where(up < 0, 0.0, up)
        hidden = hidden * hidden
    elif FUNCTION == "situ":
        if situ_linear_beta > 0:
            up = situ_linear_beta * (2.0 * _sigmoid(2.0 * up / situ_linear_beta) - 1.0)
        hidden = situ_beta * (2.0 * _sigmoid(2.0 * gate / situ_beta) - 1.0) * _sigmoid(gate) * up
    else:
        # not tl.minimum and tl.maximum, which lose NaN
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        hidden = gate * _sigmoid(alpha * gate) * (up + beta)
    return hidden


@triton.jit
def _quantize(values, inverse_scale, BM: tl.constexpr, BN: tl.constexpr):
    """Round float32 ``[BM, BN]`` to NVFP4 with a global scale: code * block scale, exact in float16."""
    blocks = tl.reshape(values, (BM, BN // 16, 16))
    scale = _round_e4m3(tl.max(tl.abs(blocks), axis=2) * (1.0 / 6.0) * inverse_scale)[:, :, None]
    factor = tl.where(scale == 0, 0.0, inverse_scale / tl.where(scale == 0, 1.0, scale))
    return tl.reshape(_round_e2m1(blocks * factor) * scale, (BM, BN)).to(tl.float16)


@triton.jit
def gemm_gate_up(
    x,
    x_scales,
    weight,
    weight_scales,
    alphas,
    up_alphas,
    inverse_scale,
    sorted_pairs,
    block_experts,
    out,
    hidden_out,
    act_alpha,
    act_beta,
    act_limit,
    situ_beta,
    situ_linear_beta,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    SHUFFLED: tl.constexpr,
    FUNCTION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """GEMM1, activation and quantization: ``BM`` (token, expert) pairs by ``BN`` channels.

    ``weight`` is the prepared w13 and ``weight_scales`` its swizzled scales, read as they lie. ``out`` takes code
    * block scale in float16, ``[pairs, 2, INTER/2]``: even channels, then odd ones, as the second GEMM reads them.
    ``hidden_out`` takes the activation's output in float32, ``[pairs, INTER]``.
    """
    halves: tl.constexpr = 1 if FUNCTION == "relu2" else 2
    expert, pair, real = _tile_pairs(sorted_pairs, block_experts, BM)
    token = pair // TOP_K
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    gate_row, up_row = _gate_up_rows(channel, INTER, BLOCK, SHUFFLED, halves == 2)
    codes = weight + expert * (halves * INTER * (HIDDEN // 2))
    scales = weight_scales + expert * (halves * INTER * (HIDDEN // 16))
    up = tl.zeros((BM, BN), tl.float32)
    gate = tl.zeros((BM, BN), tl.float32)
    for k in range(0, HIDDEN // 2, BK):
        even, odd = _token_tile(x, x_scales, token, real, k, HIDDEN, BM, BK)
        up = _add_product(up, even, odd, codes, scales, up_row, k, HIDDEN, BK, BN)
        if halves == 2:
            gate = _add_product(gate, even, odd, codes, scales, gate_row, k, HIDDEN, BK, BN)
    up = up * tl.load(up_alphas + expert)
    gate = gate * tl.load(alphas + expert)
    hidden = _activate(gate, up, act_alpha, act_beta, act_limit, situ_beta, situ_linear_beta, FUNCTION)
    quantized = _quantize(hidden, tl.load(inverse_scale), BM, BN)
    line = (pair * INTER)[:, None]
    inside = real[:, None] & (channel < INTER)[None, :]
    place = channel % 2 * (INTER // 2) + channel // 2
    tl.store(out + line + place[None, :], quantized, mask=inside)
    tl.store(hidden_out + line + channel[None, :], hidden, mask=inside)


@triton.jit
def gemm_down(
    intermediate,
    weight,
    weight_scales,
    alphas,
    router_weights,
    sorted_pairs,
    block_experts,
    out,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    SHUFFLED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """GEMM2 and the router's weight: ``BM`` pairs by ``BN`` output columns, float32 ``out [pairs, HIDDEN]``."""
    expert, pair, real = _tile_pairs(sorted_pairs, block_experts, BM)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    codes = weight + expert * (HIDDEN * (INTER // 2))
    scales = weight_scales + expert * (HIDDEN * (INTER // 16))
    place_of_row = _shuffled_place(row) if SHUFFLED else row
    result = tl.zeros((BM, BN), tl.float32)
    for k in range(0, INTER // 2, BK):
        place = intermediate + pair[:, None] * INTER + (k + tl.arange(0, BK))[None, :]
        even = tl.load(place, mask=real[:, None], other=0.0)
        odd = tl.load(place + INTER // 2, mask=real[:, None], other=0.0)
        result = _add_product(result, even, odd, codes, scales, place_of_row, k, INTER, BK, BN)
    factor = tl.load(alphas + expert) * tl.load(router_weights + pair, mask=real, other=0.0)
    tl.store(out + pair[:, None] * HIDDEN + row[None, :], result * factor[:, None], mask=real[:, None])
