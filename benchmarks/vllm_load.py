"""vLLM 0.33's own load of MoE layers onto a GPU that its compiled parts do not fit.

The real Python code (ModelConfig, model construction, the loaders, DeepSeek's load_weights, weight loaders,
process_weights_after_loading). Replaced: the platform (CpuPlatform), the subprocess that inspects models, the answer
whether the experts' kernel supports the device, and the strided view of the scales (FlashInfer). Of
process_weights_after_loading only the experts' method is called: attention would be packed for a CPU. Forward passes
are not possible so.

Needs ``tests/vllm`` on the path, which has vLLM's configuration and process groups in common with this.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import MemoryWatch

from nvfp4_prep_kernels import SCALE_VECTORS

DEVICE = torch.device("cuda")
BIG = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")


def bring_up() -> None:
    """See the module's docstring; before anything else of vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()
    import vllm.model_executor.layers.fused_moe.oracle.nvfp4 as oracle
    import vllm.model_executor.models.registry as registry
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts

    registry._run_in_subprocess = lambda fn: fn()
    oracle.nvfp4_swizzled_scale_to_cutedsl_mma_view = lambda scale: scale
    FlashInferCuteDSLExperts._supports_current_device = staticmethod(lambda: True)
    from nvfp4_prep.vllm import register

    register()


def answer_as_a_gpu() -> None:
    """Let vLLM's iterators over fastsafetensors and InstantTensor, which ask for a CUDA platform, see one."""
    import vllm.model_executor.model_loader.weight_utils as weight_utils

    class Cuda(type(weight_utils.current_platform)):  # type: ignore[misc]
        """The platform that is there, but for two answers."""

        def is_cuda(self) -> bool:
            return True

        @classmethod
        def current_device(cls) -> int:
            return torch.cuda.current_device()

    weight_utils.current_platform = Cuda()


class Clock:
    """Time inside vLLM's iterator and inside the experts' weight loaders; the rest of a load is matching names."""

    def __init__(self) -> None:
        self.iterator = self.loaders = 0.0
        self.tensors = self.calls = 0

    def watch(self, experts: Any, loader: Any) -> None:
        """Puts itself around a model's weight loaders and a loader's iterator."""
        for parameter in experts.parameters():
            if hasattr(parameter, "weight_loader"):
                parameter.weight_loader = self._around(parameter.weight_loader)
        inner = getattr(loader, "_others", loader)
        original = inner.get_all_weights
        inner.get_all_weights = lambda *args: self._iterate(original(*args))

    def _iterate(self, weights: Iterator[Any]) -> Iterator[Any]:
        while True:
            begun = time.perf_counter()
            item = next(weights, None)
            self.iterator += time.perf_counter() - begun
            if item is None:
                return
            self.tensors += 1
            yield item

    def _around(self, wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kw: Any) -> Any:
            begun = time.perf_counter()
            try:
                return wrapped(*args, **kw)
            finally:
                self.loaders += time.perf_counter() - begun
                self.calls += 1

        return timed

    def figures(self, load_s: float) -> dict[str, Any]:
        return {
            "iterator": self.iterator,
            "weight_loaders": self.loaders,
            "names_and_rest": load_s - self.iterator - self.loaders,
            "tensors": self.tensors,
            "loader_calls": self.calls,
        }


def build_model(config: Any) -> tuple[Any, Any]:
    """vLLM's loader, and its model with the parameters on the GPU."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    loader = get_model_loader(config.load_config)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), DEVICE:
        return loader, loader.create_model(vllm_config=config, model_config=config.model_config)


def load_model(config: Any, loader: Any, model: Any) -> None:
    """Fill the parameters and wait for the GPU."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), DEVICE:
        loader.load_weights(model, config.model_config)
    torch.cuda.synchronize()


def experts_of(model: Any) -> list[Any]:
    """The experts' modules, in the model's order."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def load(config: Any, profile: bool) -> tuple[Any, dict[str, Any]]:
    """One load; returns the experts module and the figures, in seconds and bytes."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    clock = Clock()
    with set_current_vllm_config(config):
        loader, model = build_model(config)
        (experts,) = experts_of(model)
        if profile:
            clock.watch(experts, loader)
        torch.cuda.synchronize()
        # Watching takes processor time, so only the profiled load is watched.
        with MemoryWatch() if profile else contextlib.nullcontext() as watch:
            begun = time.perf_counter()
            load_model(config, loader, model)
            loaded = time.perf_counter()
            with set_default_torch_dtype(torch.bfloat16):
                experts.quant_method.process_weights_after_loading(experts)
            torch.cuda.synchronize()
            done = time.perf_counter()
    figures = {
        "load": loaded - begun,
        "prepare": done - loaded,
        "total": done - begun,
        "nbytes": sum(getattr(experts, name).numel() for name in BIG),
        "report": getattr(loader, "report", None),
    }
    if profile:
        figures |= {
            "extra_device_nbytes": watch.extra_torch,
            "extra_host_nbytes": watch.extra_host,
            **clock.figures(loaded - begun),
        }
    return experts, figures


def snapshot(experts: Any) -> dict[str, torch.Tensor]:
    """What the kernel reads, on the host."""
    tensors = {name: getattr(experts, name).detach() for name in (*BIG, *SCALE_VECTORS)}
    return {name: tensor.contiguous().view(torch.uint8).flatten().cpu() for name, tensor in tensors.items()}
