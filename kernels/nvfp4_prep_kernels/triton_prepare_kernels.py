"""Device code of :mod:`nvfp4_prep_kernels.triton_prepare`; importing it needs Triton.

Every size is a ``constexpr``: a model has few shapes, and with known sizes the compiler proves that 16-byte
accesses are aligned. Expert numbers become 64-bit before they meet a stride: w13 of one Kimi layer passes 2^31 bytes.

Both kernels compute, for each place of ``prepared``, the place in the source, and copy one to the other: forward from
the source, ``INVERSE`` to it. The source is ``table`` or, if ``STACKED``, ``base_*`` and ``stride_*`` (see
:func:`_address`); ``dirty int32 [1]`` becomes 1 if a prepared byte without a source is not zero. The constants are
explained by ``IndexMap`` and made by ``plan_launch``.
"""

# Triton traces the arguments of device functions; they have no Python types.
# ruff: noqa: SIM108 (compile-time branches are written as branches)
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["codes", "scales"]


@triton.jit
def _tile(ROW_TILES: tl.constexpr, COL_TILES: tl.constexpr):
    """Return what this program moves: (expert, row of tiles, column of tiles)."""
    pid = tl.program_id(0)
    expert = (pid // (ROW_TILES * COL_TILES)).to(tl.int64)
    tile = pid % (ROW_TILES * COL_TILES)
    return expert, tile // COL_TILES, tile % COL_TILES


@triton.jit
def _unpadded(place, PAD: tl.constexpr, SRC: tl.constexpr):
    """Place in ranks of ``PAD``, of which the first ``SRC`` have a source -> (place in the source, has a source)."""
    inner = place % PAD
    return place // PAD * SRC + inner, inner < SRC


@triton.jit
def _source_row(
    n,
    BLOCK: tl.constexpr,
    SHUFFLED: tl.constexpr,
    HALVES: tl.constexpr,
    HALF_ROWS: tl.constexpr,
    ROW_PAD: tl.constexpr,
    ROW_SRC: tl.constexpr,
):
    """Return (column of the address table, source row, has a source) of a prepared row."""
    if SHUFFLED:
        n = n // 32 * 32 + n % 8 * 4 + n % 32 // 8
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
    row, row_ok = _unpadded(padded, ROW_PAD, ROW_SRC)
    return part, row, row_ok


@triton.jit
def _address(table, base_0, stride_0, base_1, stride_1, expert, part, HALVES: tl.constexpr, STACKED: tl.constexpr):
    """Return the addresses of an expert's matrix: a scalar for one projection, else one for each element of ``part``.

    ``STACKED``: address of expert 0 and bytes to the next one, for each projection; else ``table [experts, HALVES]``.
    """
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
def _flag(dirty, bad):
    """Set ``dirty`` if any element is bad."""
    worst = tl.max(bad.to(tl.int32))
    tl.atomic_max(dirty, worst, mask=worst != 0)


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
    SHUFFLED: tl.constexpr,
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
    """Copy rows of codes between source and prepared order; columns in units of ``UNIT`` bytes."""
    expert, row_tile, col_tile = _tile((ROWS + BLOCK_R - 1) // BLOCK_R, (COLS + BLOCK_C - 1) // BLOCK_C)
    n = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    c = col_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    part, row, row_ok = _source_row(n, BLOCK, SHUFFLED, HALVES, HALF_ROWS, ROW_PAD, ROW_SRC)
    if COL_PAD == COLS:
        col, col_ok = c, c < COL_SRC
    else:
        col, col_ok = _unpadded(c, COL_PAD, COL_SRC)
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
            _flag(dirty, (value != 0) & ~real)
    else:
        value = tl.load(source, mask=real, other=0)
        tl.store(target, value, mask=inside)


@triton.jit
def _move_words(
    word,
    address,
    row,
    row_ok,
    k,
    ROW_STRIDE: tl.constexpr,
    COL_PAD: tl.constexpr,
    COL_SRC: tl.constexpr,
    ALIGN: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Read ``word [4, 32, BLOCK_K]`` from the source or, ``INVERSE``, write it there; the sizes are in words.

    Returns (the words, which of them have no source and are not zero).
    """
    col, col_ok = _unpadded(k, COL_PAD, COL_SRC)
    real = row_ok & col_ok
    base = address.to(tl.pointer_type(tl.int32))
    if base.type.is_block():
        base = tl.multiple_of(base, (ALIGN, ALIGN, ALIGN))
    else:
        base = tl.multiple_of(base, ALIGN)
    source = base + row.to(tl.int64) * ROW_STRIDE + col
    if INVERSE:
        tl.store(source, word, mask=real)
    else:
        word = tl.load(source, mask=real, other=0)
    return word, (word != 0) & ~real


@triton.jit
def _move_bytes(
    word,
    address,
    row,
    row_ok,
    k,
    ROW_STRIDE: tl.constexpr,
    COL_PAD: tl.constexpr,
    COL_SRC: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """:func:`_move_words` byte by byte, where words straddle the end of a row or are not aligned; sizes in bytes."""
    base = address.to(tl.pointer_type(tl.uint8)) + row.to(tl.int64) * ROW_STRIDE
    bad = tl.zeros(word.shape, tl.int1)
    for i in tl.static_range(4):
        col, col_ok = _unpadded(4 * k + i, COL_PAD, COL_SRC)
        real = row_ok & col_ok
        if INVERSE:
            byte = (word >> (8 * i)) & 0xFF
            tl.store(base + col, byte.to(tl.uint8), mask=real)
            bad = bad | ((byte != 0) & ~real)
        else:
            word = word | (tl.load(base + col, mask=real, other=0).to(tl.int32) << (8 * i))
    return word, bad


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
    SHUFFLED: tl.constexpr,
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
    """Move block scales between row-major source and swizzled order, 128 rows by ``BLOCK_K`` words a program."""
    row_tiles: tl.constexpr = HALF_ROWS * HALVES // 128
    expert, row_tile, k_tile = _tile(row_tiles, (ROW_WORDS + BLOCK_K - 1) // BLOCK_K)
    # source side: [4 (m // 32), 32 (m % 32), word]; prepared side: [word, 32, 4], which lies in memory as it stands
    quarter = tl.arange(0, 4)[:, None, None]
    line = tl.arange(0, 32)[None, :, None]
    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    n = row_tile * 128 + quarter * 32 + line
    part, row, row_ok = _source_row(n, BLOCK, SHUFFLED, HALVES, HALF_ROWS, ROW_PAD, ROW_SRC)
    address = _address(table, base_0, stride_0, base_1, stride_1, expert, part, HALVES, STACKED)
    quarter_t = tl.arange(0, 4)[None, None, :]
    k_t = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)[:, None, None]
    first_word = expert * (row_tiles * 128 * ROW_WORDS) + (row_tile.to(tl.int64) * ROW_WORDS + k_t) * 128
    target = prepared + first_word + line * 4 + quarter_t
    row_ok = row_ok & (k < ROW_WORDS)
    if INVERSE:
        word = tl.permute(tl.load(target, mask=k_t < ROW_WORDS, other=0), (2, 1, 0))
    else:
        word = tl.zeros((4, 32, BLOCK_K), tl.int32)
    if WORDS:
        word, bad = _move_words(
            word, address, row, row_ok, k, ROW_STRIDE // 4, COL_PAD // 4, COL_SRC // 4, ALIGN, INVERSE
        )
    else:
        word, bad = _move_bytes(word, address, row, row_ok, k, ROW_STRIDE, COL_PAD, COL_SRC, INVERSE)
    if not INVERSE:
        tl.store(target, tl.permute(word, (2, 1, 0)), mask=k_t < ROW_WORDS)
    elif ROW_PAD != ROW_SRC or COL_PAD != COL_SRC:
        _flag(dirty, bad)
