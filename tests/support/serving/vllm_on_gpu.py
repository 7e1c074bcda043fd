"""Brings vLLM's Python code up on a GPU that its compiled kernels need not fit, and computes whole models there.

A wheel of vLLM fits one version of torch. Its CUDA platform, loaders, model classes, routers and sleep mode run without
its kernels: the one compiled part that sleep mode has, ``cumem_allocator``, calls the driver only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of

DEVICE = torch.device("cuda")
LOG: list[str] = []
"""What vLLM and the plugin logged since :func:`bring_up`, warnings and worse."""
_KERNELS = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C")


@functools.cache
def bring_up() -> None:
    """Make this process a vLLM on a GPU, with the plugin.

    Replaced where vLLM's kernels cannot be loaded: the modules that register them (by empty ones), two activations and
    the routers' top-k (by torch), the fused grouped top-k (by vLLM's own torch code), the answers what CUTLASS's
    kernels support (nothing), functions that an older NCCL has not (left out). Always: the subprocess in which model
    classes are inspected, and torch.compile (off: it would be most of the tests' time).
    """
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    missing = not _importable(_KERNELS[0])
    if missing:
        os.environ["VLLM_USE_FUSED_MOE_GROUPED_TOPK"] = "0"
        sys.modules |= {name: types.ModuleType(name) for name in _KERNELS}
    from vllm.platforms import current_platform

    assert current_platform.is_cuda(), f"vLLM takes this machine for {current_platform}"
    if missing:
        _stand_in_for_kernels()
        _do_without_newest_nccl()
    import vllm.model_executor.models.registry as registry

    from nvfp4_prep.vllm import register

    registry._run_in_subprocess = lambda fn: fn()
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: LOG.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(listener)
    register()


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True


def _stand_in_for_kernels() -> None:
    import vllm._custom_ops as ops

    torch.ops._C.silu_and_mul = _silu_and_mul
    torch.ops._C.relu_squared = lambda out, x: out.copy_(torch.relu(x).square())
    ops.topk_softmax = functools.partial(_top_k, lambda logits: logits.softmax(dim=-1))
    ops.topk_sigmoid = functools.partial(_top_k, torch.sigmoid)
    for name in vars(ops):
        if name.startswith("cutlass_") and "support" in name:
            setattr(ops, name, lambda *_: False)


def _do_without_newest_nccl() -> None:
    """vLLM takes a library without these functions, which nothing here calls, for none, and transfers nothing."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    newest = ("ncclCommSuspend", "ncclCommResume")
    NCCLLibrary.exported_functions = [each for each in NCCLLibrary.exported_functions if each.name not in newest]


def _silu_and_mul(out: torch.Tensor, gate_and_up: torch.Tensor) -> None:
    gate, up = gate_and_up.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _top_k(
    score: Any,
    weights: torch.Tensor,
    ids: torch.Tensor,
    _pairs: torch.Tensor,
    logits: torch.Tensor,
    renormalize: bool = False,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> None:
    scores = score(logits.float())
    chosen = torch.topk(scores if bias is None else scores + bias, ids.shape[1]).indices
    taken = scores.gather(1, chosen)
    weights.copy_(taken / taken.sum(dim=-1, keepdim=True) if renormalize else taken)
    ids.copy_(chosen)


def gpu_config(directory: Path, **options: Any) -> Any:
    """VllmConfig for the GPU, in float16, with torch's code for what is not experts."""
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return make_vllm_config(
        directory,
        device=DEVICE.type,
        model={"dtype": "float16"},
        load={"use_tqdm_on_load": False},
        compilation={"custom_ops": ["none"]},
        vllm={"attention_config": AttentionConfig(backend=AttentionBackendEnum.TRITON_ATTN)},
        **options,
    )


@dataclass
class WholeOnGpu:
    """A loaded model, which computes one sequence at a time without a KV cache."""

    config: Any
    model: torch.nn.Module

    def log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        """``float32 [T, vocabulary]``: of each next token, after 1 to T tokens."""
        from vllm.forward_context import set_forward_context
        from vllm.model_executor.layers.attention import Attention

        ids, positions = torch.tensor(tokens, device=DEVICE), torch.arange(len(tokens), device=DEVICE)
        with (
            set_forward_context(None, self.config, num_tokens=len(tokens)),
            torch.inference_mode(),
            mock.patch.object(Attention, "forward", _causal_attention),
        ):
            hidden = self.model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
            return torch.log_softmax(self.model.compute_logits(hidden).float(), dim=-1)

    def continued(self, tokens: list[int], count: int) -> list[int]:
        """The tokens and ``count`` more, greedily decoded."""
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.log_probabilities(tokens)[-1].argmax()))
        return tokens


def _causal_attention(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Attention of one sequence: what stands in its KV cache are its own keys and values."""
    split = [
        part.view(len(part), heads, -1).transpose(0, 1)
        for part, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
    ]
    found = torch.nn.functional.scaled_dot_product_attention(
        *split, is_causal=True, scale=self.impl.scale, enable_gqa=True
    )
    return found.transpose(0, 1).reshape(len(query), -1)


@contextlib.contextmanager
def loaded(directory: Path, memory: Any = None, **options: Any) -> Iterator[WholeOnGpu]:
    """A checkpoint in vLLM's own model, loaded by vLLM's loader.

    ``memory`` is a context manager that is entered for the load alone: where parameters shall be allocated.
    """
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    config = gpu_config(directory, **options)
    with rank_of(config):
        init_workspace_manager(DEVICE)
        try:
            with memory or contextlib.nullcontext():
                model = load_model(config)
            yield WholeOnGpu(config, model)
        finally:
            reset_workspace_manager()
