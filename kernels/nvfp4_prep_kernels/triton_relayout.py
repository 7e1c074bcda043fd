"""Triton kernels for :mod:`nvfp4_prep_kernels.tile_relayout`: one pass over the bytes, in place if wanted.

A program reads whole tiles, or some columns of one, into registers before it writes any of them, so that conversion
in place needs no memory beside the bytes. Triton is imported when a kernel is first used.
"""

from __future__ import annotations

import torch

from nvfp4_prep_kernels.launching import on_device
from nvfp4_prep_kernels.layout import LayoutError, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE, TILE_NBYTES
from nvfp4_prep_kernels.tile_relayout import check_out, check_relayout, tile_sources

__all__ = ["ATOMS", "CODE_UNITS", "CODE_WARPS", "SCALE_WARPS", "relayout"]

# Measured on one H100 at Kimi dimensions, in place; benchmarks/bench_trtllm_kernels.py --sweep tries others.
CODE_UNITS = 32  # 2 warps: 2.88 TB/s, 8 warps 2.7; 16 units with 8 warps 2.3
"""8-byte units of each of the 128 rows that one program moves."""
CODE_WARPS = 2
ATOMS = 4  # 2.87 TB/s, 8 atoms 2.6 to 2.8
"""Scale atoms of 512 bytes that one program moves."""
SCALE_WARPS = 4


def relayout(
    tensor: PreparedTensor,
    prepared: torch.Tensor,
    source: MoeLayout,
    target: MoeLayout,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convert like :func:`~nvfp4_prep_kernels.tile_relayout.relayout_tiles`, on the device where the bytes are.

    Both tensors begin at a multiple of 8 bytes; codes have a multiple of 8 bytes per row, as every layout makes them.
    No memory beside ``out`` is used, and none at all where ``out`` is ``prepared``.
    """
    from nvfp4_prep_kernels import triton_relayout_kernels as kernels

    check_relayout(tensor, prepared, source, target)
    out = torch.empty_like(prepared) if out is None else out
    check_out(prepared, out)
    if prepared.data_ptr() % 8 or out.data_ptr() % 8 or (not tensor.is_scale and prepared.shape[-1] % 8):
        raise LayoutError(f"{tensor.value}: memory and rows of codes must begin at multiples of 8 bytes")
    tile_sources(source.rows, target.rows, fused=tensor.is_w13)  # refuses what does not stay inside tiles
    orders = {
        "FROM_BLOCK": source.interleaved_rows if tensor.is_w13 else 0,
        "FROM_SHUFFLED": source.shuffled,
        "TO_BLOCK": target.interleaved_rows if tensor.is_w13 else 0,
        "TO_SHUFFLED": target.shuffled,
    }
    if source.rows == target.rows or prepared.numel() == 0:
        return out if out.data_ptr() == prepared.data_ptr() else out.copy_(prepared)
    with on_device(prepared.device):
        if tensor.is_scale:
            atoms = prepared.numel() // TILE_NBYTES
            kernels.scales[(-(-atoms // ATOMS),)](
                prepared.view(torch.int32),
                out.view(torch.int32),
                atoms,
                ATOMS=ATOMS,
                num_warps=SCALE_WARPS,
                **orders,
            )
        else:
            units = prepared.shape[-1] // 8
            tiles = prepared.numel() // (8 * units * ROW_TILE)
            kernels.codes[(tiles * -(-units // CODE_UNITS),)](
                prepared.view(torch.int64),
                out.view(torch.int64),
                COLS=units,
                BLOCK_C=CODE_UNITS,
                num_warps=CODE_WARPS,
                **orders,
            )
    return out
