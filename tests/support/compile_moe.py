"""Compiles the fused-MoE kernels ahead of time at Kimi dimensions; run as a program, without the interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_prep_kernels import triton_moe_kernels as kernels
from nvfp4_prep_kernels.triton_moe import DOWN_TILE, GATE_UP_TILE

GATE_UP = {
    "x": "*u8",
    "x_scales": "*u8",
    "weight": "*u8",
    "weight_scales": "*u8",
    "alphas": "*fp32",
    "up_alphas": "*fp32",
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
    """Compiles with ``constants``, ``num_warps`` among them, and names the tensor-core instructions that came out."""
    warps = constants.pop("num_warps")
    names = kernel.arg_names  # type: ignore[attr-defined]
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    found = {kind for kind in ("wgmma.mma_async", "mma.sync", "tcgen05.mma") if kind in ptx}
    return f"{sorted(found)} shared={compiled.metadata.shared}"


if __name__ == "__main__":
    for arch in (80, 90, 100):
        sizes = {"BM": 64, "HIDDEN": 7168, "INTER": 2048}
        for function, block, shuffled in (("swiglu", 64, False), ("swiglu", 1, True), ("relu2", 0, False)):
            order = {"BLOCK": block, "SHUFFLED": shuffled}
            gate_up = {**sizes, "TOP_K": 8, **order, "FUNCTION": function, **GATE_UP_TILE}
            print(arch, function, compile_one(kernels.gemm_gate_up, GATE_UP, gate_up, arch))
        for shuffled in (False, True):
            down = {**sizes, "SHUFFLED": shuffled, **DOWN_TILE}
            print(arch, "down", compile_one(kernels.gemm_down, DOWN, down, arch))
