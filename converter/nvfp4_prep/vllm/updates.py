"""New weights for a running model: refused before a byte changes unless they are what the model was started with.

vLLM reloads by asking the loader of its load format for all tensors of another directory (``get_all_weights``), of
whose configs it reads nothing, and takes the model's parameters apart afterwards. So the loaders check in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor import model_loader
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from nvfp4_prep.checkpoint.filenames import CONFIG
from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import QUANT_METHOD
from nvfp4_prep.serving.prepared_weights import PreparedWeights
from nvfp4_prep.serving.updates import check_holds_layers, check_same_layout, read_config

__all__ = ["ChecksUpdates", "guard_loaders", "running_layers"]

Weights = Iterator[tuple[str, torch.Tensor]]


class ChecksUpdates:
    """Mixed into a loader class of vLLM: what it reads for a running prepared model is checked before it is read."""

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Weights:
        """Return what the loader returns.

        Raises:
            CheckpointError, ServingError: if the model is running and these are not weights for it. At once, not when
                the first tensor is asked for: by then vLLM has put the model's parameters on the meta device.
        """
        running = running_layers(model)
        if running:
            _check_update(model_config, running)
        weights: Weights = super().get_all_weights(model_config, model)  # type: ignore[misc]
        return _into_fresh_parameters(weights, model_config, running) if running else weights


def guard_loaders() -> None:
    """Have the loaders of all load formats check. Called when a prepared layer is created; safe to call again.

    The load format ``nvfp4_prep`` asks another one for all tensors.
    """
    registry = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for load_format, loader in registry.items():
        reloads = hasattr(loader, "get_all_weights") and load_format != QUANT_METHOD
        if reloads and not issubclass(loader, ChecksUpdates):
            # The name and the module stay vLLM's: both appear in its log, and the module is where it reads files.
            names = {"__module__": loader.__module__, "__qualname__": loader.__qualname__, "__doc__": loader.__doc__}
            registry[load_format] = type(loader.__name__, (ChecksUpdates, loader), names)


def running_layers(model: torch.nn.Module) -> list[Any]:
    """Return a model's prepared layers whose kernel was built; none while the model is loaded for the first time."""
    found = ((module, getattr(module, "nvfp4_prep", None)) for module in model.modules())
    return [module for module, weights in found if isinstance(weights, PreparedWeights) and weights.in_use]


def _check_update(model_config: ModelConfig, running: list[Any]) -> None:
    served = running[0].quant_method.stamp
    place = str(model_config.model_weights or model_config.model)
    directory = Path(place)
    if directory.is_dir():
        check_same_layout(served, read_config(directory), str(directory / CONFIG))
        check_holds_layers(directory, [layer.nvfp4_prep.placement for layer in running])
        return
    config = None if "://" in place else get_hf_file_to_dict(CONFIG, place, model_config.revision)
    if config is None:
        raise ServingError(
            f"weights for a running model come from a place whose {CONFIG} cannot be read",
            where=place,
            next_step="Download the checkpoint and give its directory.",
        )
    check_same_layout(served, config, f"{place}, {CONFIG}")


def _into_fresh_parameters(weights: Weights, model_config: ModelConfig, running: list[Any]) -> Weights:
    """Yield the tensors, unless they would be copied over what the kernel made of the earlier ones."""
    if not all(layer.w13_weight.is_meta for layer in running):
        raise ServingError(
            "a checkpoint's tensors would be copied over a running kernel's",
            where=str(model_config.model),
            next_step="Reload with is_checkpoint_format=True, vLLM's default.",
        )
    yield from weights
