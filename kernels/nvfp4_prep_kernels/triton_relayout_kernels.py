"""Device code of :mod:`nvfp4_prep_kernels.triton_relayout`; importing it needs Triton.

The barrier between loads and stores makes conversion in place right: a row that one thread overwrites may be
another's to read.
"""

# Triton traces the arguments of device functions; they have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["codes", "scales"]


@triton.jit
def _source_place(
    n,
    FROM_BLOCK: tl.constexpr,
    FROM_SHUFFLED: tl.constexpr,
    TO_BLOCK: tl.constexpr,
    TO_SHUFFLED: tl.constexpr,
):
    """Row of a tile in the target's order -> the place of that row in the source's order."""
    if TO_SHUFFLED:
        n = n // 32 * 32 + n % 8 * 4 + n % 32 // 8
    if TO_BLOCK != FROM_BLOCK:
        gate = n % (2 * TO_BLOCK) // TO_BLOCK
        row = n // (2 * TO_BLOCK) * TO_BLOCK + n % TO_BLOCK
        n = row // FROM_BLOCK * (2 * FROM_BLOCK) + gate * FROM_BLOCK + row % FROM_BLOCK
    if FROM_SHUFFLED:
        n = n // 32 * 32 + n % 4 * 8 + n % 32 // 4
    return n


@triton.jit
def codes(
    source,
    target,
    COLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FROM_BLOCK: tl.constexpr,
    FROM_SHUFFLED: tl.constexpr,
    TO_BLOCK: tl.constexpr,
    TO_SHUFFLED: tl.constexpr,
):
    """128 rows by ``BLOCK_C`` units of 8 bytes a program."""
    col_tiles: tl.constexpr = (COLS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    first = (pid // col_tiles).to(tl.int64) * (128 * COLS)
    n = tl.arange(0, 128)
    c = pid % col_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (n < 128)[:, None] & (c < COLS)[None, :]
    place = _source_place(n, FROM_BLOCK, FROM_SHUFFLED, TO_BLOCK, TO_SHUFFLED)
    value = tl.load(source + first + place[:, None] * COLS + c[None, :], mask=inside, other=0)
    tl.debug_barrier()
    tl.store(target + first + n[:, None] * COLS + c[None, :], value, mask=inside)


@triton.jit
def scales(
    source,
    target,
    atoms,
    ATOMS: tl.constexpr,
    FROM_BLOCK: tl.constexpr,
    FROM_SHUFFLED: tl.constexpr,
    TO_BLOCK: tl.constexpr,
    TO_SHUFFLED: tl.constexpr,
):
    """``ATOMS`` swizzle atoms a program: row ``m`` of a tile is word ``(m % 32) * 4 + m // 32`` of each atom."""
    atom = tl.program_id(0).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    word = tl.arange(0, 128)
    place = _source_place(word % 4 * 32 + word // 4, FROM_BLOCK, FROM_SHUFFLED, TO_BLOCK, TO_SHUFFLED)
    place = place % 32 * 4 + place // 32
    inside = (atom < atoms)[:, None] & (word < 128)[None, :]
    value = tl.load(source + atom[:, None] * 128 + place[None, :], mask=inside, other=0)
    tl.debug_barrier()
    tl.store(target + atom[:, None] * 128 + word[None, :], value, mask=inside)
