"""Compiles the fused-MoE kernels ahead of time at Kimi dimensions; run as a program, without the interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_prep_kernels import triton_moe_kernels as kernels

GATE_UP = {
    "x": "*u8",
    "x_scales": "*u8",
    "weight": "*u8",
    "weight_scales": "*u8",
    "alphas": "*fp32",
    "inverse_scale": "*fp32",
    "sorted_pairs": "*i32",
    "block_experts": "*i32",
    "out": "*fp16",
    "hidden_out": "*fp32",
    **dict.fromkeys(("act_alpha", "act_beta", "act_limit", "situ_beta", "situ_linear_beta"), "fp32"),
}
DOWN = {
    "intermediate": "*fp16",
    "weight": "*u8",
    "weight_scales": "*u8",
    "alphas": "*fp32",
    "router_weights": "*fp32",
    "sorted_pairs": "*i32",
    "block_experts": "*i32",
    "out": "*fp32",
}


def compile_one(kernel: object, signature: dict[str, str], constants: dict[str, object], arch: int) -> str:
    """Compiles and names the tensor-core instructions that came out."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    found = {kind for kind in ("wgmma.mma_async", "mma.sync", "tcgen05.mma") if kind in ptx}
    return f"{sorted(found)} shared={compiled.metadata.shared}"


if __name__ == "__main__":
    for arch in (80, 90, 100):
        tile = {"BM": 64, "HIDDEN": 7168, "INTER": 2048}
        for function, block in (("swiglu", 64), ("relu2", 0)):
            gate_up = {**tile, "TOP_K": 8, "BLOCK": block, "FUNCTION": function, "BN": 64, "BK": 64}
            print(arch, function, compile_one(kernels.gemm_gate_up, GATE_UP, gate_up, arch))
        print(arch, "down", compile_one(kernels.gemm_down, DOWN, {**tile, "BN": 128, "BK": 32}, arch))
