"""Reordering gate and up rows of loaded parameters, where the kernel wants another block height than the file has."""

from __future__ import annotations

import torch

from nvfp4_prep_kernels.gate_up import deinterleave_gate_up, interleave_gate_up
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales, unswizzle_scales

__all__ = ["reorder_gate_up"]


def reorder_gate_up(weight: torch.Tensor, scale: torch.Tensor, stored: int, wanted: int) -> None:
    """Brings ``w13_weight`` and ``w13_weight_scale`` from one block height to another, in place, on their device.

    Args:
        weight, scale: ``uint8 [E, rows, bytes per row]``; scales swizzled.
        stored, wanted: rows in one gate/up block.

    One expert at a time: extra memory is about three times one expert's gate and up projections.
    """
    for slot in range(weight.shape[0]):
        weight[slot].copy_(interleave_gate_up(*deinterleave_gate_up(weight[slot], stored), wanted))
        linear = unswizzle_scales(scale[slot])
        scale[slot].copy_(swizzle_scales(interleave_gate_up(*deinterleave_gate_up(linear, stored), wanted)))
