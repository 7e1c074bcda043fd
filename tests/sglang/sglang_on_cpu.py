"""Brings the real SGLang up on the CPU build of torch, where no GPU and no compiled kernels exist.

Import this before anything of SGLang and call :func:`bring_up`. Nothing that loads, prepares or stores weights is
replaced; what is, is listed there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@functools.cache
def bring_up() -> None:
    """Make this process an SGLang that takes itself for one on a Blackwell GPU, with all tensors on the CPU.

    Replaced: the answers about the platform (sm_100), ``Tensor.cuda`` (identity: SGLang's swizzle of linear layers ends
    in it), FlashInfer's CUDA function ``nvfp4_block_scale_interleave`` (written out below), and modules that are not
    installed (IPython, torchvision, gguf, soundfile, vLLM's rotary embedding), by empty ones.
    """
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # remembered: there is none
    sys.meta_path.append(_Stubs())
    importlib.import_module("vllm._custom_ops")  # RotaryEmbedding asks for one function of it on a CPU
    from sglang.srt.runtime_context import get_platform

    get_platform()._install(is_sm100=True, is_blackwell=True)
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.cuda.get_device_capability = lambda *_args: (10, 0)
    import flashinfer

    flashinfer.nvfp4_block_scale_interleave = interleave_block_scales


def interleave_block_scales(scales: torch.Tensor) -> torch.Tensor:
    """The 128x4 swizzle of one matrix, flat, as FlashInfer's CUDA function of this name."""
    rows, cols = scales.shape
    m, k = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    offset = m // 128 * (cols // 4 * 512) + k // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    out = torch.full((rows * cols,), 0xA5, dtype=torch.uint8)
    out[offset.flatten()] = scales.reshape(-1).view(torch.uint8)
    return out


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that SGLang imports and that loading does not need, empty; last in the path, so real ones win."""

    roots = ("IPython", "torchvision", "gguf", "soundfile", "vllm")
    vllm = ("vllm", "vllm._custom_ops")  # of its other modules SGLang asks whether they are there

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        root = name.partition(".")[0]
        if root not in self.roots or (root == "vllm" and name not in self.vllm):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _anything  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to execute."""


class _Anything(type):
    """A class whose every attribute is one more of its kind."""

    def __getattr__(cls, name: str) -> type:
        return _anything(name)


def _anything(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


def make_server_args(directory: Path, *, moe_runner_backend: str = "auto", **options: Any) -> Any:
    """ServerArgs of a checkpoint directory, resolved by SGLang's own pipeline as on a Blackwell GPU."""
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=str(directory),
        skip_tokenizer_init=True,
        device="cpu",
        moe_runner_backend=moe_runner_backend,
        **options,
    )
    args.resolve_once()
    return args


@contextlib.contextmanager
def rank_of(args: Any, rank: int = 0, meeting: str | None = None) -> Iterator[None]:
    """gloo groups of as many processes as ``args`` wants, with ``args`` published as SGLang's configuration.

    ``meeting`` is the path of a file that does not exist yet, the same in all ranks.
    """
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, publish, reset_context

    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    initialize_moe_config()
    path = meeting or meeting_point()
    world = args.tp_size * args.pp_size
    init_distributed_environment(world, rank, f"file://{path}", rank, backend="gloo")
    initialize_model_parallel(backend="gloo")
    try:
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()
        reset_context()
        if rank == 0:
            Path(path).unlink(missing_ok=True)


def meeting_point() -> str:
    """A path at which ranks can meet: no port that somebody else could take."""
    return tempfile.mktemp(prefix="nvfp4-prep-ranks-")


def load_model(args: Any, *, draft: bool = False, **load: Any) -> Any:
    """SGLang's own loader from files on disk: construction, load_weights, process_weights_after_loading.

    Args:
        draft: the checkpoint's own draft model instead, as speculative decoding loads it.
        load: LoadConfig fields.
    """
    return load_for_updates(args, draft=draft, **load)[0]


def load_for_updates(args: Any, *, draft: bool = False, directory: Path | None = None, **load: Any) -> tuple[Any, Any]:
    """A model as :func:`load_model` loads it, and what updates its weights in a running server.

    Args:
        directory: a draft model's own.
    """
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.eplb.expert_location import (
        compute_initial_expert_location_metadata,
        set_global_expert_location_metadata,
    )
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.model_loader.loader import get_model_loader
    from sglang.srt.runtime_context import get_parallel

    model_config = ModelConfig.from_server_args(
        args, model_path=str(directory or args.model_path), is_draft_model=draft
    )
    locations = compute_initial_expert_location_metadata(model_config, moe_ep_rank=get_parallel().moe_ep_rank)
    set_global_expert_location_metadata(locations, allow_overwrite=True)  # as its model runner does
    loader = get_model_loader(load_config=LoadConfig(**load), model_config=model_config)  # by names, as it does
    model = loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))
    updater = WeightUpdater(
        tp_rank=get_parallel().tp_rank,
        device="cpu",
        gpu_id=0,
        model_config=model_config,
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda *_args, **_kwargs: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: None,
    )
    return model, updater


@functools.cache
def plug_in() -> None:
    """Load the plugin as SGLang does: by its entry point, or directly where this tree is not installed."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from nvfp4_prep.sglang import register

    register()
    HookRegistry.apply_hooks()
