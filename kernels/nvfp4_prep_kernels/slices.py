"""Byte ranges of a prepared layer that one rank needs: index arithmetic, no data.

A prepared tensor is expert-major, so an expert-parallel rank takes whole experts. Within one expert the share of a
tensor-parallel rank is a regular run pattern:

    w13_weight, w13_weight_scale   one run: rows [g*r*Ir, g*(r+1)*Ir)
    w2_weight                      one run a row: bytes [r*Ir/2, (r+1)*Ir/2)
    w2_weight_scale                one run a tile row: 512-byte tiles [r*Ir/64, (r+1)*Ir/64) of Ip/64

with g = 2 for gated experts and Ir = Ip / tp. The batched layout keeps ``[gate; up]``, so there w13 has two
runs, one in each half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_prep_kernels.layout import LayoutError, MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE, TILE_NBYTES

__all__ = ["ExpertSlice", "rank_slice", "take_rank", "take_slice"]


@dataclass(frozen=True)
class ExpertSlice:
    """The bytes that one tensor-parallel rank takes from one expert of a prepared tensor.

    Run ``i`` of ``runs`` covers bytes ``[offset_bytes + i * stride_bytes, ... + run_nbytes)`` of the expert; the runs
    one after the other are the rank's tensor, of shape ``shape`` (rows, bytes per row).
    """

    shape: tuple[int, int]
    offset_bytes: int
    run_nbytes: int
    stride_bytes: int
    runs: int

    @property
    def nbytes(self) -> int:
        """Bytes of the rank's share of one expert."""
        return self.runs * self.run_nbytes


def rank_slice(layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, rank: int, size: int) -> ExpertSlice:
    """Return the share of tensor-parallel rank ``rank`` of ``size`` in one expert.

    Raises:
        LayoutError: if the rank is out of range or a file in this layout cannot serve ``size`` ranks.
    """
    if not 0 <= rank < size:
        raise LayoutError(f"tensor-parallel rank {rank} of {size} does not exist")
    if size not in layout.tp_sizes(dims, limit=size):
        sizes = ", ".join(map(str, layout.tp_sizes(dims)))
        helps = f"; convert again with --moe-tp {size}" if dims.intermediate % size == 0 else ""
        raise LayoutError(
            f"cannot serve {size} tensor-parallel ranks: intermediate size {dims.intermediate} is padded for"
            f" {layout.moe_tp}; it serves {sizes}{helps}"
        )
    rows, row_nbytes = layout.expert_shape(tensor, dims)
    if tensor.is_w13:
        share = rows // size
        if layout.concatenated:
            half = share // 2 * row_nbytes
            return ExpertSlice((share, row_nbytes), rank * half, half, rows // 2 * row_nbytes, 2)
        nbytes = share * row_nbytes
        return ExpertSlice((share, row_nbytes), rank * nbytes, nbytes, nbytes, 1)
    shape = (rows, row_nbytes // size)
    if size == 1:
        return ExpertSlice(shape, 0, rows * row_nbytes, rows * row_nbytes, 1)
    line = TILE_NBYTES // 4 * row_nbytes if tensor.is_scale else row_nbytes
    runs = rows // ROW_TILE if tensor.is_scale else rows
    return ExpertSlice(shape, rank * (line // size), line // size, line, runs)


def take_rank(
    layout: MoeLayout, tensor: PreparedTensor, prepared: torch.Tensor, dims: MoeDims, rank: int, size: int
) -> torch.Tensor:
    """Return the share of one tensor-parallel rank, from data.

    Args:
        prepared: ``uint8 [..., rows, bytes per row]`` as ``layout.expert_shape`` gives them, contiguous.

    Returns:
        ``uint8 [..., rows, bytes per row]`` in ``rank_slice(...).shape``, contiguous.
    """
    return take_slice(prepared, rank_slice(layout, tensor, dims, rank, size))


def take_slice(prepared: torch.Tensor, part: ExpertSlice) -> torch.Tensor:
    """Return the bytes of a slice, from data: ``uint8 [..., rows, bytes per row]`` in ``part.shape``, contiguous."""
    *lead, rows, row_nbytes = prepared.shape
    flat = prepared.reshape(*lead, rows * row_nbytes)
    runs = flat.unfold(-1, part.run_nbytes, 1)[..., part.offset_bytes :: part.stride_bytes, :][..., : part.runs, :]
    return runs.reshape(*lead, *part.shape).contiguous()
