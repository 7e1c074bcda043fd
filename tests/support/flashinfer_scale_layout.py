"""FlashInfer's own words on the scale layout, evaluated on the CPU; run as a program in an environment with
FlashInfer.

Two oracles that share nothing with our formula: the converter ``cvt_sf_MKL_to_M32x4xrm_K4xrk_L`` of the kernel's
source, run on CPU memory, and CuTe's ``tile_atom_to_shape_SF``, which the kernel itself calls, evaluated at every
(row, column). Prints "equal" for each.
"""

# ruff: noqa: E402 (the environment must be set first)

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["CUTE_DSL_ARCH"] = "sm_100a"
os.environ["FLASHINFER_DISABLE_VERSION_CHECK"] = "1"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests")]

import cutlass
import cutlass.cute as cute
import cutlass.utils.blockscaled_layout as blockscaled
import flashinfer.fused_moe.cute_dsl.blackwell.blockscaled_contiguous_gather_grouped_gemm_act_fusion as gemm1
import torch
from cutlass.cute.runtime import from_dlpack
from flashinfer.cute_dsl.utils import convert_sf_to_mma_layout

from nvfp4_prep_kernels.flashinfer_moe import mma_view
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales

SIZES = ((1, 128, 4), (2, 256, 12), (3, 384, 16))


def by_the_converter(scales: torch.Tensor) -> torch.Tensor:
    """``[E, M, Ks]`` row-major to swizzled bytes, by FlashInfer's converter."""
    experts, rows, cols = scales.shape
    stored = torch.zeros(experts, rows // 128, cols // 4, 32, 4, 4, dtype=torch.float32)
    reference = scales.to(torch.float32).permute(1, 2, 0)
    gemm1.cvt_sf_MKL_to_M32x4xrm_K4xrk_L(from_dlpack(reference), from_dlpack(stored.permute(3, 4, 1, 5, 2, 0)))
    return stored.to(torch.uint8).view(experts, rows, cols)


def by_the_layout(scales: torch.Tensor) -> torch.Tensor:
    """The same by evaluating the layout that the kernel gives its scale tensor."""
    experts, rows, cols = scales.shape
    offsets = torch.zeros(experts * rows * cols, dtype=torch.int32)

    @cute.jit
    def evaluate(out: cute.Tensor) -> None:
        layout = blockscaled.tile_atom_to_shape_SF((rows, cols * 16, experts), 16)
        for expert in cutlass.range(experts):
            for row in cutlass.range(rows):
                for col in cutlass.range(cols):
                    out[(expert * rows + row) * cols + col] = layout((row, col * 16, expert))

    evaluate(from_dlpack(offsets))
    stored = torch.empty(scales.numel(), dtype=torch.uint8)
    stored[offsets.long()] = scales.flatten()
    return stored.view(experts, rows, cols)


if __name__ == "__main__":
    for size in SIZES:
        scales = torch.randint(0, 256, size, dtype=torch.uint8)
        ours = swizzle_scales(scales)
        flashinfer_view = convert_sf_to_mma_layout(ours.view(-1, size[2]), size[1], size[2] * 16, size[0])
        for name, same in (
            ("cvt_sf_MKL_to_M32x4xrm_K4xrk_L", torch.equal(ours, by_the_converter(scales))),
            ("tile_atom_to_shape_SF", torch.equal(ours, by_the_layout(scales))),
            (
                "convert_sf_to_mma_layout",
                flashinfer_view.shape == mma_view(ours).shape
                and flashinfer_view.stride() == mma_view(ours).stride()
                and torch.equal(flashinfer_view, mma_view(ours)),
            ),
        ):
            print(*size, name, "equal" if same else "DIFFERENT", flush=True)
