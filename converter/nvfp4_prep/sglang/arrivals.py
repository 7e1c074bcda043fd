"""Prepared layers in a checkpoint's files, and those that a model took: none may be passed over in silence.

SGLang's models map names of tensors to their parameters, each in its own way, and pass over what they do not know.
So each prepared tensor carries the name of its stored layer to the parameter that takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, parse_json
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.checkpoint.small_files import read_small_file
from nvfp4_prep.errors import CheckpointError, ServingError
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.serving.placement import STORED_TENSORS
from nvfp4_prep.sglang.source_config import adopted_stamp
from nvfp4_prep_kernels import UP_SCALE_VECTOR

__all__ = [
    "check_model",
    "expected_layers",
    "prepared_layer",
    "prepared_layers",
    "seen_by",
    "stored_layer_of",
    "tagged",
]

_TAG, _SEEN = "nvfp4_prep_stored_layer", "nvfp4_prep_seen"
_STORED, _PARAMETER = ".routed_experts.", "."
_SPELLED = tuple(f".experts{_STORED}{name}" for name in (*STORED_TENSORS, UP_SCALE_VECTOR))
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_DRAFT = re.compile(r"(?:^|\.)(?:mtp|nextn)", re.IGNORECASE)
_NEXT = "The directory is damaged or incomplete: run `nvfp4-prep verify` on it."


def prepared_layer(name: str) -> str | None:
    """Return the stored layer of a prepared tensor's name; ``None`` for any other tensor."""
    return name.rpartition(_STORED)[0] if name.endswith(_SPELLED) else None


def tagged(name: str, tensor: torch.Tensor, seen: set[str] | None = None) -> tuple[str, torch.Tensor]:
    """Return a stored tensor under SGLang's name; a prepared one carries its layer, which was now seen."""
    layer = prepared_layer(name)
    if layer is None:
        return name, tensor
    setattr(tensor, _TAG, layer)
    if seen is not None:
        seen.add(layer)
    return name.replace(f".experts{_STORED}", f".experts{_PARAMETER}"), tensor


def stored_layer_of(tensor: torch.Tensor) -> str | None:
    """Return the layer that a tensor carries."""
    return getattr(tensor, _TAG, None)


def seen_by(loader: Any) -> set[str]:
    """Return the prepared layers that came out of a loader's files."""
    seen: set[str] = vars(loader).setdefault(_SEEN, set())
    return seen


def check_model(model: Any, model_config: Any, loader: Any, folder: Path | None) -> Any:
    """Return the model, or raise :class:`ServingError` unless it took every prepared layer that it ought to hold.

    Args:
        model: loaded.
        model_config: of it. A stock checkpoint's passes.
        loader: that loaded it.
        folder: the directory of the files, if they are local: its manifest may name layers that no file has.
    """
    if adopted_stamp(model_config.hf_config) is None:
        return model
    seen = seen_by(loader)
    stored = seen
    if folder is not None and getattr(loader.load_config, "draft_model_idx", None) is None:
        stored = seen | _named(folder)  # an index picks one of several draft layers, which the manifest does not
    taken = {name for layer in prepared_layers(model) for name in layer.nvfp4_prep.stored_layers}
    untaken = sorted(set(expected_layers(stored, model, model_config, folder)) - taken)
    draft = bool(model_config.is_draft_model)
    if untaken or not (stored or draft):
        raise _untaken(model, untaken, draft=draft, some_taken=bool(taken))
    return model


def prepared_layers(model: Any) -> list[Any]:
    """Return the modules of a model's prepared layers."""
    return [module for module in model.modules() if hasattr(module, "nvfp4_prep")]


def _named(folder: Path) -> set[str]:
    """Return the prepared layers that the manifest names; none if there is no manifest, as in a Hub's snapshot."""
    path = folder / MANIFEST
    if not path.is_file():
        return set()
    manifest = Manifest.from_bytes(read_small_file(path, CheckpointError, _NEXT), str(path))
    return {layer.source.experts_path for layer in manifest.layers}


def expected_layers(stored: Iterable[str], model: Any, model_config: Any, folder: Path | None) -> list[str]:
    """Return the layers that belong to this model and to this rank's pipeline stage."""
    count = _hidden_layers(model_config, folder)
    drafts = [layer for layer in stored if _DRAFT.search(layer) or (count is not None and _number(layer) >= count)]
    if model_config.is_draft_model:
        own = str(model_config.hf_config.architectures[0]).endswith(("NextN", "MTP")) and count != 1
        return drafts if drafts or own else list(stored)
    first, end = _stage(model)
    return [layer for layer in stored if layer not in drafts and (first <= _number(layer) < end)]


def _number(layer: str) -> int:
    found = _NUMBER.search(layer)
    return 0 if found is None else int(found.group(1))


def _hidden_layers(model_config: Any, folder: Path | None) -> int | None:
    """Return the number of layers before those of drafts.

    From the file, because SGLang changes this number for some draft models.
    """
    path = None if folder is None else folder / CONFIG
    if path is None or not path.is_file():
        count = getattr(model_config.hf_text_config, "num_hidden_layers", None)
        return count if type(count) is int else None
    config = parse_json(read_small_file(path, ServingError, _NEXT), str(path), ServingError, max_depth=MAX_DEPTH)
    for holder in (config.get("text_config") if isinstance(config, dict) else None, config):
        count = holder.get("num_hidden_layers") if isinstance(holder, dict) else None
        if type(count) is int:
            return count
    return None


def _stage(model: Any) -> tuple[int, float]:
    """Return the layers of this rank's pipeline stage, as SGLang's models name them: from the first to before the end.

    Models without stages have all.
    """
    for module in model.modules():
        bounds = getattr(module, "start_layer", None), getattr(module, "end_layer", None)
        if hasattr(module, "layers") and all(type(bound) is int for bound in bounds):
            return bounds[0], bounds[1]  # type: ignore[return-value]
    return 0, float("inf")


def _untaken(model: Any, untaken: list[str], *, draft: bool, some_taken: bool) -> ServingError:
    instead = "serve it with vLLM, or serve the source checkpoint (`nvfp4-prep restore` brings it back)."
    if draft:
        instead = "leave speculative decoding with this draft model out, or serve with vLLM."
    if not some_taken and not draft:
        return ServingError(
            "the checkpoint is prepared, but this model class of SGLang has no NVFP4 expert layers of the fused kind",
            where=type(model).__name__,
            actual=f"not taken: {', '.join(untaken)}" if untaken else "no prepared layer in the files",
            next_step=instead[0].upper() + instead[1:],
        )
    return ServingError(
        f"prepared layers were passed over by this model class of SGLang: {', '.join(untaken)}",
        where=type(model).__name__,
        next_step=f"A file may be missing: run `nvfp4-prep verify` on the directory. If it is whole, {instead}",
    )
