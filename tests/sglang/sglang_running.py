"""A server's model on one rank, which runs, and a trainer's ways to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from sglang_models import MODELS
from sglang_on_cpu import load_for_updates, make_server_args, rank_of
from sglang_states import differences, snapshot, storage_of
from sglang_trainer import Named
from torch.multiprocessing import reductions

ATTENTION = {
    f"model.layers.{layer}.self_attn.{name}.weight": shape
    for layer in (0, 1)
    for name, shape in {"q_proj": (128, 256), "k_proj": (64, 256), "v_proj": (64, 256), "o_proj": (256, 128)}.items()
}
QWEN = replace(MODELS["qwen3_moe"], family="qwen3_moea", others={**MODELS["qwen3_moe"].others, **ATTENTION})
OTHER_BYTES = replace(QWEN, family="qwen3_moeb")
FIRST, LAST = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
FORMER = "The server goes on with the former weights."
CUSTOM = "sglang_running.custom"

Answer = tuple[bool, str]


class Running:
    """A server's model on one rank, and a trainer's ways to it."""

    def __init__(self, stack: ExitStack, directory: Path, *, backend: str = "auto", **load: Any) -> None:
        args = make_server_args(directory, moe_runner_backend=backend)
        stack.enter_context(rank_of(args))
        self.model, self.updater = load_for_updates(args, **load)
        self.updater.custom_weight_loaders[CUSTOM] = True
        self.first, self.storage = snapshot(self.model), storage_of(self.model)

    def send(self, named: Named, way: str = "tensors") -> Answer:
        """One update in a session of its own, as SGLang's scheduler runs it."""
        self.updater.begin_weight_update()
        answer: Answer = WAYS[way](self.updater, list(named.items()))
        self.updater.end_weight_update(run_post_load=False)
        return answer

    def changed(self) -> list[str]:
        return differences(self.first, snapshot(self.model))


def serialized(updater: Any, named: list[tuple[str, torch.Tensor]]) -> Answer:
    """As Engine.update_weights_from_tensor packs them, one entry a rank."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor
    from sglang.srt.utils import MultiprocessingSerializer

    # A server's process packs no tensors of the CPU: SGLang's patch of torch, made for those of a GPU, fails on them.
    ForkingPickler.register(torch.Tensor, getattr(reductions, "_reduce_tensor_original", reductions.reduce_tensor))
    packed = [(n, LocalSerializedTensor([MultiprocessingSerializer.serialize(t)])) for n, t in named]
    return updater.update_weights_from_tensor(packed)  # type: ignore[no-any-return]


def bucket(updater: Any, named: list[tuple[str, torch.Tensor]]) -> Answer:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    made = FlattenedTensorBucket(named_tensors=named)
    packed = {"flattened_tensor": made.get_flattened_tensor(), "metadata": made.get_metadata()}
    return updater.update_weights_from_tensor(packed, load_format="flattened_bucket")  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Any, list[tuple[str, torch.Tensor]]], Answer]] = {
    "tensors": lambda updater, named: updater.update_weights_from_tensor(named),
    "serialized": serialized,
    "bucket": bucket,
    "direct": lambda updater, named: updater.update_weights_from_tensor(named, "direct"),
    "custom": lambda updater, named: updater.update_weights_from_tensor(named, CUSTOM),
    "broadcast": lambda updater, named: updater.load_weights_from_distributed(named),
}


def custom(model: Any, named: list[tuple[str, torch.Tensor]]) -> None:
    """A user's own loader (``--custom-weight-loader``)."""
    model.load_weights(named)


def renamed(named: Named, old: str, new: str) -> Named:
    return {name.replace(old, new): tensor for name, tensor in named.items()}


def without(named: Named, words: str) -> Named:
    return {name: tensor for name, tensor in named.items() if words not in name}
