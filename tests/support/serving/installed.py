"""Abilities of the installed vLLM that the supported versions do not share, for the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

from nvfp4_prep.vllm.layout_check import installed_layout

__all__ = ["NEEDS_PADDING", "PADS", "reload_from"]

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
