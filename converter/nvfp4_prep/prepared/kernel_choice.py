"""Names of kernels for people: the one that a layout is for, and the one that servers choose by themselves.

What is said of vLLM and SGLang was read in the code of vLLM 0.33 and SGLang 0.5.23; docs/which-kernel.md has the
whole story.
"""

from __future__ import annotations

from nvfp4_prep.options import LayoutName

__all__ = ["KERNELS", "kernel_lines"]

KERNELS = {
    LayoutName.CUTEDSL: "FlashInfer's CuteDSL fused MoE",
    LayoutName.CUTEDSL_BATCHED: "FlashInfer's batched CuteDSL fused MoE",
    LayoutName.TRTLLM: "FlashInfer's TRTLLM-gen fused MoE",
}
"""Layouts to the kernel that reads them."""
_BACKENDS = {
    LayoutName.CUTEDSL: "FLASHINFER_CUTEDSL",
    LayoutName.CUTEDSL_BATCHED: "FLASHINFER_CUTEDSL_BATCHED",
    LayoutName.TRTLLM: "FLASHINFER_TRTLLM",
}


def kernel_lines(layout: LayoutName) -> list[str]:
    """Return which kernel a file in this layout runs, what servers would run for the source, and how to choose."""
    runs = f"runs {KERNELS[layout]} (vLLM's {_BACKENDS[layout]}) on compute capability 10.x"
    if layout is LayoutName.TRTLLM:
        return [f"{runs}, which vLLM and SGLang choose by themselves on a B200; --layout cutedsl is for the other one"]
    if layout is LayoutName.CUTEDSL_BATCHED:
        return [f"{runs}, which vLLM takes with DeepEP low latency"]
    return [
        f"{runs}; for the source vLLM and SGLang choose FLASHINFER_TRTLLM by themselves on a B200",
        "to run that one: convert with --layout trtllm, or have vLLM serve this file with --moe-backend"
        " flashinfer_trtllm (docs/which-kernel.md)",
    ]
