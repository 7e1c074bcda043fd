"""Prepared bytes of one layout to those of another, tile by tile: without the source, and in place if wanted.

Layouts of one family differ only inside tiles of 128 rows: the same 64 rows of gate and 64 of up (128 rows of
up or down) lie in each tile, in another order. Codes move as rows of their tile, scales as 32-bit words of their
512-byte atom, so that any whole number of tiles can be converted alone: an expert, or a rank's share of it. The one
exception is w13 of the batched layout, ``[gate; up]``: its halves lie in different tiles.

This torch code is normative; :mod:`nvfp4_prep_kernels.triton_relayout` gives the same bytes on a GPU.
"""

from __future__ import annotations

import functools

import torch

from nvfp4_prep_kernels.layout import LayoutError, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.row_order import RowOrder, place_of_row, row_at_place
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE, WORD_COLS

__all__ = ["can_relayout", "check_out", "check_relayout", "keeps_tiles", "relayout_tiles", "tile_sources"]


def can_relayout(source: MoeLayout, target: MoeLayout, tensor: PreparedTensor | None = None) -> bool:
    """Return whether bytes move only inside tiles from one layout to the other.

    Sizes without padding are not known here: layouts that pad H differently (standard and batched) agree where H
    needs no padding, which the caller sees in equal shapes.

    Args:
        tensor: one prepared tensor; all four if not given.
    """
    if source.gated != target.gated or source.moe_tp != target.moe_tp:
        return False
    fused = tensor is None or tensor.is_w13
    return not fused or source.concatenated == target.concatenated


def keeps_tiles(source: MoeLayout, target: MoeLayout, tensor: PreparedTensor) -> bool:
    """Return whether a tensor's bytes are the same in both layouts, of which :func:`can_relayout` is true."""
    return tile_sources(source.rows, target.rows, fused=tensor.is_w13) == tuple(range(ROW_TILE))


def check_relayout(tensor: PreparedTensor, prepared: torch.Tensor, source: MoeLayout, target: MoeLayout) -> None:
    """Raise :class:`LayoutError` unless :func:`relayout_tiles` can convert these bytes."""
    if not can_relayout(source, target, tensor):
        raise LayoutError(
            f"{tensor.value} cannot be converted inside tiles of {ROW_TILE} rows from {source} to {target}:"
            " they differ in more than the order inside a tile"
        )
    if prepared.dtype != torch.uint8 or prepared.dim() < 2 or not prepared.is_contiguous():
        raise LayoutError(
            f"{tensor.value} is {prepared.dtype} {list(prepared.shape)} with strides {list(prepared.stride())}: must"
            " be contiguous torch.uint8 [..., rows, bytes per row]"
        )
    rows, row_nbytes = prepared.shape[-2:]
    if rows % ROW_TILE or row_nbytes % WORD_COLS:
        raise LayoutError(
            f"{tensor.value}: {rows} rows of {row_nbytes} bytes are not whole tiles of {ROW_TILE} rows"
            f" and {WORD_COLS} bytes"
        )


@functools.cache
def tile_sources(source: RowOrder, target: RowOrder, *, fused: bool) -> tuple[int, ...]:
    """Return the row of the source tile that stands in each row of a target tile.

    Raises:
        LayoutError: if a row comes from another tile.
    """
    if source == target:
        return tuple(range(ROW_TILE))
    found = []
    for place in range(ROW_TILE):
        half, row = row_at_place(target, fused=fused, place=place, half_rows=ROW_TILE)
        found.append(place_of_row(source, fused=fused, half=half, row=row, half_rows=ROW_TILE))
    if sorted(found) != list(range(ROW_TILE)):
        raise LayoutError(f"rows of one tile of {target} lie in several tiles of {source}")
    return tuple(found)


def relayout_tiles(
    tensor: PreparedTensor,
    prepared: torch.Tensor,
    source: MoeLayout,
    target: MoeLayout,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convert whole tiles of a prepared tensor from one layout to another.

    Args:
        tensor: which prepared tensor the bytes belong to.
        prepared: ``uint8 [..., rows, bytes per row]``, contiguous: experts or shares of tensor-parallel ranks.
        out: memory for the result, of the same shape; ``prepared`` itself converts in place. Allocated if not given.

    Returns:
        ``out``. Memory beside it, in place: one matrix ``[rows, bytes per row]``.

    Raises:
        LayoutError: if the layouts differ in more than the order inside tiles, or the bytes are not whole tiles.
    """
    check_relayout(tensor, prepared, source, target)
    out = torch.empty_like(prepared) if out is None else out
    check_out(prepared, out)
    order = tile_sources(source.rows, target.rows, fused=tensor.is_w13)
    if tensor.is_scale:
        unit, width, order = torch.int32, ROW_TILE, _atom_words(order)
    else:
        unit, width = torch.uint8, prepared.shape[-1] * ROW_TILE
    index = torch.tensor(order, device=prepared.device)
    rows, row_nbytes = prepared.shape[-2:]
    for old, new in zip(prepared.view(-1, rows, row_nbytes), out.view(-1, rows, row_nbytes), strict=True):
        tiles, made = (each.view(-1).view(unit).view(-1, ROW_TILE, width // ROW_TILE) for each in (old, new))
        if old.data_ptr() == new.data_ptr():
            made.copy_(tiles.index_select(1, index))
        else:
            torch.index_select(tiles, 1, index, out=made)
    return out


def _atom_words(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the same permutation of a scale atom's 128 words, where row ``m`` is word ``(m % 32) * 4 + m // 32``."""
    return tuple(_word(order[word % 4 * 32 + word // 4]) for word in range(ROW_TILE))


def _word(row: int) -> int:
    return row % 32 * 4 + row // 32


def check_out(prepared: torch.Tensor, out: torch.Tensor) -> None:
    """Raise :class:`LayoutError` unless ``out`` can take the result: the same shape, the same memory or another."""
    if out.shape != prepared.shape or out.dtype != prepared.dtype or not out.is_contiguous():
        raise LayoutError(
            f"out is {out.dtype} {list(out.shape)}: must be contiguous {prepared.dtype} {list(prepared.shape)}"
        )
    if out.device != prepared.device:
        raise LayoutError(f"out is on {out.device}, the bytes are on {prepared.device}: must be on one device")
    begin, end = out.data_ptr(), out.data_ptr() + out.numel()
    if begin != prepared.data_ptr() and begin < prepared.data_ptr() + prepared.numel() and prepared.data_ptr() < end:
        raise LayoutError("out overlaps the bytes without being them")
