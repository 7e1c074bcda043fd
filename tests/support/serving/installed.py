"""Abilities of the installed vLLM that the supported versions do not share, for the tests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

from nvfp4_prep.vllm.layout_check import installed_layout

__all__ = ["NEEDS_PADDING", "PADS", "reload_from", "reload_with", "tensors_of_files"]

PADS = installed_layout(NvFp4MoeBackend.FLASHINFER_CUTEDSL, gated=True).pads is True
NEEDS_PADDING = pytest.mark.skipif(not PADS, reason="this vLLM does not pad: refused, see test_models.py")


def reload_from(config: Any, model: Any, directory: Path) -> None:
    """Reload a model's weights from a directory in place, as the worker does it."""
    if importlib.util.find_spec("vllm.model_executor.model_loader.reload.inplace") is not None:
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        reload_weights(config, model, None, str(directory), is_checkpoint_format=True)
        return
    # vLLM 0.31: these lines stand in GPUModelRunner.reload_weights.
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    config.model_config.model = str(directory)
    weights = get_model_loader(config.load_config).get_all_weights(config.model_config, model)
    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, config.model_config)


def reload_with(config: Any, model: Any, weights: Iterable[tuple[str, torch.Tensor]], **options: Any) -> None:
    """Reload a model's weights from tensors that no directory is known of, as a trainer in the process does it."""
    inplace = pytest.importorskip("vllm.model_executor.model_loader.reload.inplace", reason="new in vLLM 0.32")
    inplace.reload_weights(config, model, weights, None, **{"is_checkpoint_format": True, **options})


def tensors_of_files(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's safetensors files that its index names."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(index.values())):
        found |= load_file(directory / file)
    return {name: tensor for name, tensor in found.items() if name in index}
