"""vLLM without its refusal of experts that are not gated on a CPU.

``FusedMoEConfig`` raises "is_act_and_mul=False is supported only for CUDA, XPU and ROCm for now", whatever computes the
experts. Importing this module has the one module that says so believe that it runs on a GPU; it asks for nothing else
but the name of the 8-bit float type.

Run as a program it is vLLM's OpenAI server, with the arguments of ``python -m vllm.entrypoints.openai.api_server``. The
engine's processes, which are spawned, import this program too.
"""

from __future__ import annotations

import runpy

from vllm.model_executor.layers.fused_moe import config
from vllm.platforms.cpu import CpuPlatform


class GpuLikeCpuPlatform(CpuPlatform):
    """The CPU's platform, which answers for the experts as a GPU's does."""

    def is_cuda_alike(self) -> bool:
        return True


config.current_platform = GpuLikeCpuPlatform()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
