"""Brings the real vLLM up on the CPU build of torch, where no GPU, no compiled kernels and no Triton exist.

Import this before anything else of vLLM. Nothing that loads, prepares or stores weights is replaced; what is, is listed
in :func:`bring_up`.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@functools.cache
def bring_up() -> None:
    """Makes this process a CPU vLLM that accepts the CuteDSL experts.

    Replaced: the platform (CpuPlatform), ``Tensor.cuda`` (identity: swizzle_blockscale ends in it), the device answer
    of the two CuteDSL experts classes, FusedMoEConfig's platform answer (it has a check that non-gated experts run on a
    GPU), the list of NVFP4 linear kernels of the CPU platform (emulation), the cache emptying of an accelerator that is
    not there, and the subprocess in which model classes are inspected.
    """
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform

    class GpuLikeCpuPlatform(CpuPlatform):
        """Answers is_cuda_alike() for the one module that asks it about non-gated experts."""

        def is_cuda_alike(self) -> bool:
            return True

    platforms._current_platform = CpuPlatform()
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.accelerator.empty_cache = lambda: None

    import vllm.model_executor.kernels.linear as linear
    import vllm.model_executor.layers.fused_moe.config as fused_moe_config
    import vllm.model_executor.models.registry as registry
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_batched_moe import (
        FlashInferCuteDSLBatchedExperts,
    )
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts
    from vllm.platforms import PlatformEnum

    fused_moe_config.current_platform = GpuLikeCpuPlatform()
    registry._run_in_subprocess = lambda fn: fn()
    linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [EmulationNvFp4LinearKernel]
    for experts in (FlashInferCuteDSLExperts, FlashInferCuteDSLBatchedExperts):
        experts._supports_current_device = staticmethod(lambda: True)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def make_vllm_config(directory: Path, *, moe_backend: str = "flashinfer_cutedsl", **options: Any) -> Any:
    """VllmConfig of a checkpoint directory, all of it read by vLLM.

    ``options``: ``load_format``, ``model`` (ModelConfig fields), ``parallel`` (ParallelConfig fields), ``load``
    (LoadConfig fields), ``vllm`` (VllmConfig fields).
    """
    from vllm.config import (
        CompilationConfig,
        DeviceConfig,
        KernelConfig,
        LoadConfig,
        ModelConfig,
        ParallelConfig,
        VllmConfig,
    )

    model_config = ModelConfig(
        model=str(directory),
        tokenizer=str(directory),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        **options.get("model", {}),
    )
    return VllmConfig(
        model_config=model_config,
        load_config=LoadConfig(load_format=options.get("load_format", "auto"), **options.get("load", {})),
        device_config=DeviceConfig("cpu"),
        parallel_config=ParallelConfig(**options.get("parallel", {})),
        kernel_config=KernelConfig(moe_backend=moe_backend),
        compilation_config=CompilationConfig(mode=0),
        **options.get("vllm", {}),
    )


@contextlib.contextmanager
def single_rank(config: Any) -> Iterator[None]:
    """One-process gloo groups and ``config`` as the current vLLM configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def load_model(config: Any) -> Any:
    """vLLM's own loader from files on disk: construction, load_weights, process_weights_after_loading."""
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(config.load_config)
    return loader.load_model(vllm_config=config, model_config=config.model_config)


def routed_experts(model: torch.nn.Module) -> dict[str, Any]:
    """The routed-expert modules of a model by their layer name (``….experts``)."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {module.layer_name: module for module in model.modules() if isinstance(module, RoutedExperts)}
