"""Device code of :mod:`nvfp4_prep_kernels.triton_prepare`; importing it needs Triton.

Every size is a ``constexpr``: a model has few shapes, and with known sizes the compiler proves that 16-byte
accesses are aligned. Expert numbers become 64-bit before they meet a stride: w13 of one Kimi layer passes 2^31 bytes.
"""

# Triton traces the arguments of device functions; they have no Python types.
# ruff: noqa: SIM108 (compile-time branches are written as branches)
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["codes", "scales"]


@triton.jit
def _source_row(
    n, BLOCK: tl.constexpr, HALVES: tl.constexpr, HALF_ROWS: tl.constexpr, ROW_PAD: tl.constexpr, ROW_SRC: tl.constexpr
):
    """Prepared row -> (column of the address table, source row, has a source)."""
    if BLOCK > 0:
        j = n % (2 * BLOCK)
        # the table holds gate first, as the layout's projections do; prepared rows start with up
        part = tl.where(j < BLOCK, 1, 0)
        padded = n // (2 * BLOCK) * BLOCK + j % BLOCK
    elif HALVES == 2:
        part = n // HALF_ROWS
        padded = n % HALF_ROWS
    else:
        part = n * 0
        padded = n
    inner = padded % ROW_PAD
    return part, padded // ROW_PAD * ROW_SRC + inner, inner < ROW_SRC


@triton.jit
def _address(table, base_0, stride_0, base_1, stride_1, expert, part, HALVES: tl.constexpr, STACKED: tl.constexpr):
    """Address of an expert's matrix: a scalar for one projection, else one for each element of ``part``."""
    if STACKED:
        if HALVES == 1:
            address = base_0 + expert * stride_0
        else:
            address = tl.where(part == 0, base_0 + expert * stride_0, base_1 + expert * stride_1)
    else:
        if HALVES == 1:
            address = tl.load(table + expert)
        else:
            # rows beyond the end have no projection; what is read there is not used
            address = tl.load(table + expert * 2 + tl.minimum(part, 1))
    return address


@triton.jit
def codes(
    table,
    prepared,
    dirty,
    base_0,
    stride_0,
    base_1,
    stride_1,
    STACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    HALVES: tl.constexpr,
    HALF_ROWS: tl.constexpr,
    ROW_PAD: tl.constexpr,
    ROW_SRC: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COL_PAD: tl.constexpr,
    COL_SRC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copies rows of codes between source and prepared order; columns in units of ``UNIT`` bytes."""
    col_tiles: tl.constexpr = (COLS + BLOCK_C - 1) // BLOCK_C
    row_tiles: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    expert = (pid // (row_tiles * col_tiles)).to(tl.int64)
    tile = pid % (row_tiles * col_tiles)
    n = tile // col_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile % col_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    part, row, row_ok = _source_row(n, BLOCK, HALVES, HALF_ROWS, ROW_PAD, ROW_SRC)
    if COL_PAD == COLS:
        col, col_ok = c, c < COL_SRC
    else:
        col, col_ok = c // COL_PAD * COL_SRC + c % COL_PAD, c % COL_PAD < COL_SRC
    inside = (n < ROWS)[:, None] & (c < COLS)[None, :]
    real = inside & row_ok[:, None] & col_ok[None, :]
    address = _address(table, base_0, stride_0, base_1, stride_1, expert, part, HALVES, STACKED)
    element: tl.constexpr = tl.int64 if UNIT == 8 else tl.uint8
    base = tl.multiple_of(address.to(tl.pointer_type(element)), UNIT * ALIGN)
    if HALVES == 2:
        base = base[:, None]
    source = base + (row.to(tl.int64) * ROW_STRIDE)[:, None] + col[None, :]
    target = prepared + expert * (ROWS * COLS) + n.to(tl.int64)[:, None] * COLS + c[None, :]
    if INVERSE:
        value = tl.load(target, mask=inside, other=0)
        tl.store(source, value, mask=real)
        if ROW_PAD != ROW_SRC or COL_PAD != COL_SRC:
            bad = tl.max(tl.max(((value != 0) & inside & (real == 0)).to(tl.int32), axis=1), axis=0)
            tl.atomic_max(dirty, bad, mask=bad != 0)
    else:
        value = tl.load(source, mask=real, other=0)
        tl.store(target, value, mask=inside)


@triton.jit
def scales(
    table,
    prepared,
    dirty,
    base_0,
    stride_0,
    base_1,
    stride_1,
    STACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    HALVES: tl.constexpr,
    HALF_ROWS: tl.constexpr,
    ROW_PAD: tl.constexpr,
    ROW_SRC: tl.constexpr,
    INVERSE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COL_PAD: tl.constexpr,
    COL_SRC: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Moves block scales between row-major source and swizzled order, 128 rows by ``BLOCK_K`` words a program."""
    k_tiles: tl.constexpr = (ROW_WORDS + BLOCK_K - 1) // BLOCK_K
    row_tiles: tl.constexpr = HALF_ROWS * HALVES // 128
    pid = tl.program_id(0)
    expert = (pid // (row_tiles * k_tiles)).to(tl.int64)
    tile = pid % (row_tiles * k_tiles)
    row_tile = tile // k_tiles
    # source side: [4 (m // 32), 32 (m % 32), word]; prepared side: [word, 32, 4], which lies in memory as it stands
    quarter = tl.arange(0, 4)[:, None, None]
    line = tl.arange(0, 32)[None, :, None]
    k = tile % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    part, row, row_ok = _source_row(row_tile * 128 + quarter * 32 + line, BLOCK, HALVES, HALF_ROWS, ROW_PAD, ROW_SRC)
    address = _address(table, base_0, stride_0, base_1, stride_1, expert, part, HALVES, STACKED)
    line_t = tl.arange(0, 32)[None, :, None]
    quarter_t = tl.arange(0, 4)[None, None, :]
    k_t = tile % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)[:, None, None]
    tile_words = expert * (row_tiles * 128 * ROW_WORDS) + (row_tile.to(tl.int64) * ROW_WORDS + k_t) * 128
    target = prepared + tile_words + line_t * 4 + quarter_t
    inside_t = (k_t < ROW_WORDS) & (line_t >= 0) & (quarter_t >= 0)
    inside = (k < ROW_WORDS) & (row >= 0)
    if INVERSE:
        word = tl.permute(tl.load(target, mask=inside_t, other=0), (2, 1, 0))
    else:
        word = tl.zeros((4, 32, BLOCK_K), tl.int32)
    if WORDS:
        pad_words: tl.constexpr = COL_PAD // 4
        src_words: tl.constexpr = COL_SRC // 4
        stride_words: tl.constexpr = ROW_STRIDE // 4
        real = inside & row_ok & (k % pad_words < src_words)
        if HALVES == 1:
            base = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), ALIGN)
        else:
            base = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), (ALIGN, ALIGN, ALIGN))
        source = base + row.to(tl.int64) * stride_words + (k // pad_words * src_words + k % pad_words)
        if INVERSE:
            tl.store(source, word, mask=real)
            bad = ((word != 0) & inside & (real == 0)).to(tl.int32)
        else:
            word = tl.load(source, mask=real, other=0)
    else:
        bad = tl.zeros((4, 32, BLOCK_K), tl.int32)
        base = address.to(tl.pointer_type(tl.uint8)) + row.to(tl.int64) * ROW_STRIDE
        for i in tl.static_range(4):
            c = 4 * k + i
            real = inside & row_ok & (c % COL_PAD < COL_SRC)
            source = base + (c // COL_PAD * COL_SRC + c % COL_PAD)
            if INVERSE:
                byte = (word >> (8 * i)) & 0xFF
                tl.store(source, byte.to(tl.uint8), mask=real)
                bad = bad | ((byte != 0) & inside & (real == 0)).to(tl.int32)
            else:
                word = word | (tl.load(source, mask=real, other=0).to(tl.int32) << (8 * i))
    if INVERSE:
        if ROW_PAD != ROW_SRC or COL_PAD != COL_SRC:
            worst = tl.max(tl.max(tl.max(bad, axis=2), axis=1), axis=0)
            tl.atomic_max(dirty, worst, mask=worst != 0)
    else:
        tl.store(target, tl.permute(word, (2, 1, 0)), mask=inside_t)
