"""FlashInfer's row orders for TRTLLM-gen, evaluated on the CPU; run as a program in an environment with FlashInfer.

Its own index functions, the ones that vLLM and SGLang call, against this project's bytes: for each of the four
tensors the rows that they name, then the swizzle. Prints "equal" for each.
"""

# ruff: noqa: E402 (the environment must be set first)

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


os.environ["FLASHINFER_DISABLE_VERSION_CHECK"] = "1"
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests")]

import torch
from flashinfer.fused_moe.core import _maybe_get_cached_w3_w1_permute_indices, get_w2_permute_indices_with_cache

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.scale_swizzle import unswizzle_scales
from support.layout_cases import random_parts

CASES = ((True, 512, 512), (True, 192, 256), (True, 2048, 7168), (False, 512, 512), (False, 128, 256))
"""Gated, I and H; nothing is padded."""


def indices(tensor: PreparedTensor, fused: torch.Tensor, gated: bool) -> torch.Tensor:
    """Row of ``fused`` ([up; gate], up or down) for each prepared row, as FlashInfer says."""
    group = 16 if tensor.is_scale else None
    if tensor.is_w13:
        return _maybe_get_cached_w3_w1_permute_indices({}, fused, 128, num_elts_per_sf=group, is_gated_act_gemm=gated)
    return get_w2_permute_indices_with_cache({}, fused, 128, num_elts_per_sf=group)


def main() -> None:
    """Prints one line for each case and tensor."""
    for gated, intermediate, hidden in CASES:
        layout, dims = MoeLayout.trtllm(gated=gated), MoeDims(1, intermediate, hidden)
        for tensor in PreparedTensor:
            parts = random_parts(layout, tensor, dims)
            fused = torch.cat(parts[::-1])  # [up; gate]
            made = layout.apply(tensor, *parts)
            rows = unswizzle_scales(made) if tensor.is_scale else made
            equal = torch.equal(rows, fused[indices(tensor, fused, gated)])
            print(gated, intermediate, hidden, tensor.value, "equal" if equal else "DIFFERENT")


if __name__ == "__main__":
    main()
