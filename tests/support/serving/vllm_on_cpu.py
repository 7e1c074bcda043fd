"""Brings the real vLLM up on the CPU build of torch, where no GPU, no compiled kernels and no Triton exist.

Import this before anything else of vLLM and call :func:`bring_up`. Nothing that loads, prepares or stores weights is
replaced; what is, is listed there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LIFT_REFUSAL = "NVFP4_PREP_TEST_LIFT_REFUSAL"
"""Environment variable: 1 has the plugin take an older vLLM for a tested one, in the tests' processes alone."""


_frozen = 0
"""How many modules there were when :func:`freeze_imports` last froze."""


@functools.cache
def bring_up() -> None:
    """Makes this process a CPU vLLM that accepts the CuteDSL experts.

    Replaced: the platform (CpuPlatform), ``Tensor.cuda`` (identity: swizzle_blockscale ends in it), the device answer
    of the two CuteDSL experts classes, ``is_cuda_alike()`` as seen by two modules that refuse non-gated experts and
    EPLB on a CPU, the NVFP4 linear kernels of the CPU platform (emulation), the cache emptying of an accelerator that
    is not there, the answer whether this CPU has AMX (its linear kernels are compiled ones), the subprocess in which
    model classes are inspected, and torchvision, which Llama-4's image processor imports (an empty module: no image is
    ever processed).
    """
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform

    class GpuLikeCpuPlatform(CpuPlatform):
        """Answers is_cuda_alike() for the modules that ask nothing else of it."""

        def is_cuda_alike(self) -> bool:
            return True

    platforms._current_platform = CpuPlatform()
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.accelerator.empty_cache = lambda: None
    torch.cpu._is_amx_tile_supported = lambda: False

    import vllm.config.parallel as parallel_config
    import vllm.model_executor.kernels.linear as linear
    import vllm.model_executor.layers.fused_moe.config as fused_moe_config
    import vllm.model_executor.models.registry as registry
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_batched_moe import (
        FlashInferCuteDSLBatchedExperts,
    )
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts
    from vllm.platforms import PlatformEnum

    parallel_config.current_platform = GpuLikeCpuPlatform()
    fused_moe_config.current_platform = GpuLikeCpuPlatform()
    registry._run_in_subprocess = lambda fn: fn()
    linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [EmulationNvFp4LinearKernel]
    for experts in (FlashInferCuteDSLExperts, FlashInferCuteDSLBatchedExperts):
        experts._supports_current_device = staticmethod(lambda: True)

    if os.environ.get(LIFT_REFUSAL) == "1":
        _take_for_tested()

    _stub_torchvision()  # last: transformers must have found out that there is none


def freeze_imports() -> None:
    """Leave everything that is there now out of garbage collection, if modules were imported since the last call.

    vLLM collects garbage three times a load; over all that it imports, that would be a third of the tests' time. It
    imports model classes when it meets their names, so once at the start is not enough.
    """
    global _frozen
    if (imported := len(sys.modules)) != _frozen:
        gc.collect()
        gc.freeze()
        _frozen = imported


def _take_for_tested() -> None:
    from nvfp4_prep.vllm import versions

    minor = ".".join(versions.installed_version().split(".")[:2])
    versions.TESTED = (minor, *(tested for tested in versions.TESTED if tested != minor))
    if not hasattr(torch.ops._C, "silu_and_mul"):  # until 0.30 its layer wants the compiled function on a CPU
        torch.ops._C.silu_and_mul = _silu_and_mul


def _silu_and_mul(out: torch.Tensor, gate_and_up: torch.Tensor) -> None:
    gate, up = gate_and_up.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _stub_torchvision() -> None:
    """Empty modules for ``from torchvision.transforms.v2 import functional``, where torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    names = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    )
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


def meeting_point() -> str:
    """A path at which ranks can meet: no port that somebody else could take."""
    return tempfile.mktemp(prefix="nvfp4-prep-ranks-")


def make_vllm_config(
    directory: Path, *, moe_backend: str = "flashinfer_cutedsl", device: str = "cpu", **options: Any
) -> Any:
    """VllmConfig of a checkpoint directory, all of it read by vLLM.

    ``options``: ``model`` (ModelConfig fields), ``parallel`` (ParallelConfig fields), ``load`` (LoadConfig fields),
    ``compilation`` (CompilationConfig fields), ``vllm`` (VllmConfig fields).
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

    fields = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
    model_config = ModelConfig(model=str(directory), tokenizer=str(directory), **{**fields, **options.get("model", {})})
    return VllmConfig(
        model_config=model_config,
        load_config=LoadConfig(**options.get("load", {})),
        device_config=DeviceConfig(device),
        parallel_config=ParallelConfig(**options.get("parallel", {})),
        kernel_config=KernelConfig(moe_backend=moe_backend),
        compilation_config=CompilationConfig(mode=0, **options.get("compilation", {})),
        **options.get("vllm", {}),
    )


@contextlib.contextmanager
def rank_of(config: Any, rank: int = 0, world: int = 1, meeting: str | None = None) -> Iterator[None]:
    """gloo groups of ``world`` processes as ``config`` wants them, and ``config`` as vLLM's current configuration.

    ``meeting`` is the path of a file that does not exist yet, the same in all ranks.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from vllm.model_executor.models import utils

    freeze_imports()
    # vLLM remembers by id(model) which layers another pipeline rank has; ids come back once a model is gone.
    utils._model_to_pp_missing_layer_names.clear()
    parallel = config.parallel_config
    with set_current_vllm_config(config):
        path = meeting or meeting_point()
        init_distributed_environment(world, rank, f"file://{path}", rank, backend="gloo")
        initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        try:
            yield
        finally:
            # Not cleanup_dist_env_and_memory: it undoes gc.freeze().
            destroy_model_parallel()
            destroy_distributed_environment()
            if rank == 0:
                Path(path).unlink(missing_ok=True)


def load_model(config: Any) -> Any:
    """vLLM's own loader from files on disk: construction, load_weights, process_weights_after_loading."""
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(config.load_config)
    return loader.load_model(vllm_config=config, model_config=config.model_config)


def routed_experts(model: torch.nn.Module) -> dict[str, Any]:
    """The routed-expert modules of a model by their layer name (``….experts``)."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {module.layer_name: module for module in model.modules() if isinstance(module, RoutedExperts)}
