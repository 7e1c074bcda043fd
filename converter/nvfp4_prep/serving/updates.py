"""Weights for a running model: what a server does not ask of the directory that they come from.

A server that replaces the weights of a running model reads tensors only, no config. Names and shapes of two layouts are
alike, so the tensors alone would not tell that a kernel gets another layout's bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, parse_json
from nvfp4_prep.checkpoint.filenames import CONFIG
from nvfp4_prep.checkpoint.small_files import read_small_file
from nvfp4_prep.errors import ServingError
from nvfp4_prep.load import Catalog
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.prepared.stamp import Stamp, stamp_in
from nvfp4_prep.serving.placement import Placement

__all__ = ["Tensors", "check_holds_layers", "check_same_layout", "check_same_tensors", "read_config"]

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype, as safetensors names it, and shape by a tensor's name in the checkpoint."""


def read_config(directory: Path) -> Mapping[str, Any]:
    """Return what the ``config.json`` of a local directory says.

    Raises:
        ServingError: if there is none, or it cannot be read.
    """
    file = directory / CONFIG
    raw = read_small_file(file, ServingError, "Give the directory of a whole prepared checkpoint.")
    config = parse_json(raw, str(file), ServingError, max_depth=MAX_DEPTH)
    return config if isinstance(config, dict) else {}


def check_same_layout(served: Stamp, config: Mapping[str, Any], where: str) -> None:
    """Raise :class:`ServingError` unless weights come from a checkpoint in the layout that the model was started with.

    Args:
        served: the stamp of the running model.
        config: ``config.json`` of the weights' checkpoint.
        where: that file, for the message.
    """
    found = stamp_in(config)
    other = None if found is None else Stamp.parse(found)
    if other is not None and replace(other, source={}) == replace(served, source={}):
        return
    raise ServingError(
        "weights of another layout than the served one",
        where=where,
        expected=_layout_words(served),
        actual="no stamp of nvfp4-prep" if other is None else _layout_words(other),
        next_step="Convert it with the layout of the running server (`nvfp4-prep convert`, for a prepared checkpoint"
        " `nvfp4-prep relayout`), or start a server on it.",
    )


def check_same_tensors(served: Tensors, found: Tensors, where: str) -> None:
    """Raise :class:`ServingError` unless weights have the names, dtypes and shapes of what is served.

    Servers pass over names that they do not know, and keep what they have where a tensor does not come.
    """
    problem = _difference(served, found)
    if problem is not None:
        raise _another_model(problem, where)


def check_holds_layers(directory: Path, served: Sequence[Placement]) -> None:
    """Check that a local directory holds all tensors of the served layers, in their sizes. Reads headers alone.

    Raises:
        CheckpointError: if the directory is not a complete prepared checkpoint, or a file is missing or damaged.
        ServingError: if it is another model's.
    """
    catalog = Catalog.open(directory)
    layers = [(layer, catalog.records(layer)) for layer in catalog.manifest.layers]
    for placement in served:
        problems = [
            _difference(
                {layer.prepared_name(name): placement.stored(name) for name in placement.names},
                {layer.prepared_name(name): (record.dtype, record.shape) for name, record in records.items()},
            )
            for layer, records in layers
            if _is_same_number(layer, placement)
        ]
        if None not in problems:
            problem = problems[0] if problems else "it has no such prepared layer"
            raise _another_model(str(problem), f"{directory}, layer {placement.layer_name}")


def _difference(served: Tensors, found: Tensors) -> str | None:
    missing, foreign = sorted(served.keys() - found.keys()), sorted(found.keys() - served.keys())
    other = sorted(name for name in served.keys() & found.keys() if served[name] != found[name])
    if other:
        other[0] += f" ({_tensor_words(*found[other[0]])}, not {_tensor_words(*served[other[0]])})"
    for words, names in (("does not have", missing), ("has besides", foreign), ("has in other sizes", other)):
        if names:
            return f"it {words} {first_of(names)}"
    return None


def _tensor_words(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}".lstrip()


def _another_model(problem: str, where: str) -> ServingError:
    return ServingError(
        f"weights of another model than the served one: {problem}",
        where=where,
        next_step="Give the whole directory of a conversion of the same model, or start a server on this one.",
    )


def _is_same_number(layer: LayerRecord, placement: Placement) -> bool:
    """Return whether two names are of one layer: servers rename what stands before its number."""
    number = _LAYER_NUMBER.search(placement.layer_name)
    return number is None or int(number[1]) == layer.index


def _layout_words(stamp: Stamp) -> str:
    return f"{stamp.layout_name}, gate/up block {stamp.gate_up_block}, moe-tp {stamp.moe_tp}"
