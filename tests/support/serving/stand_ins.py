"""Parts of vLLM replaced by others: a registry without the plugin, another block height, DeepEP's all-to-all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def installed_kernel_with(block: int) -> Iterator[None]:
    """A vLLM whose preparation interleaves gate and up in other blocks, as vLLM #55015 will."""
    from vllm.model_executor.layers.quantization.utils import flashinfer_fp4_moe

    from nvfp4_prep.vllm.layout_check import installed_layout

    original = flashinfer_fp4_moe.interleave_linear_and_gate
    installed_layout.cache_clear()
    changed = lambda x, group_size, dim: original(x, group_size=block, dim=dim)  # noqa: E731
    try:
        with mock.patch.object(flashinfer_fp4_moe, "interleave_linear_and_gate", changed):
            yield
    finally:
        installed_layout.cache_clear()


@contextlib.contextmanager
def batched_all_to_all() -> Iterator[None]:
    """What DeepEP low latency makes of the configuration, without DeepEP."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    yes = property(lambda self: True)
    with mock.patch.object(FusedMoEParallelConfig, "use_batched_activation_format", yes):
        yield


@contextlib.contextmanager
def batched_prepare() -> Iterator[None]:
    """vLLM's own torch implementation of a batched prepare/finalize in DeepEP's place, which is not installed."""
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4
    from vllm.model_executor.layers.fused_moe.prepare_finalize.batched import BatchedPrepareAndFinalize

    made = BatchedPrepareAndFinalize(max_num_tokens=16, num_local_experts=8, num_dispatchers=1, rank=0)
    with batched_all_to_all(), mock.patch.object(nvfp4, "maybe_make_prepare_finalize", lambda **_: made):
        yield


@contextlib.contextmanager
def trtllm_on_cpu() -> Iterator[None]:
    """A vLLM that accepts the TRTLLM-gen experts and prepares their weights on the CPU.

    Replaced: the device answer of the experts classes, the number of the current accelerator, and FlashInfer's
    ``nvfp4_block_scale_interleave``, a CUDA kernel, by vLLM's own torch function for the same swizzle.
    """
    import flashinfer
    import torch
    from vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe import TrtLlmNvFp4ExpertsBase
    from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

    def interleave(scales: torch.Tensor) -> torch.Tensor:
        return swizzle_blockscale(scales.view(torch.float8_e4m3fn)).view(torch.uint8).reshape(-1)

    with (
        mock.patch.object(TrtLlmNvFp4ExpertsBase, "_supports_current_device", staticmethod(lambda: True)),
        mock.patch.object(torch.accelerator, "current_device_index", lambda: "cpu"),
        mock.patch.object(flashinfer, "nvfp4_block_scale_interleave", interleave),
    ):
        yield


@contextlib.contextmanager
def without_plugin() -> Iterator[None]:
    """vLLM's registry as it is without the plugin."""
    from vllm.model_executor.layers import quantization

    custom, methods = dict(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG), list(quantization.QUANTIZATION_METHODS)
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.clear()
    quantization.QUANTIZATION_METHODS[:] = [name for name in methods if name != "nvfp4_prep"]
    try:
        yield
    finally:
        quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.clear()
        quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.update(custom)
        quantization.QUANTIZATION_METHODS[:] = methods
