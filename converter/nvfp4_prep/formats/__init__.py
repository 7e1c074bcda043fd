"""Quantization formats and tensor namings. Third parties add theirs through entry points."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from nvfp4_prep.errors import UsageError
from nvfp4_prep.formats.base import ExpertNaming, ExpertTensorName, Leaf, QuantFormat
from nvfp4_prep.formats.compressed_tensors import CompressedTensors
from nvfp4_prep.formats.modelopt import ModelOpt
from nvfp4_prep.formats.naming import MoeStackNaming, PerExpertNaming, ProjectionFirstNaming, StackedNaming

__all__ = [
    "ExpertNaming",
    "ExpertTensorName",
    "Leaf",
    "QuantFormat",
    "formats",
    "namings",
]

FORMAT_GROUP = "nvfp4_prep.formats"
NAMING_GROUP = "nvfp4_prep.namings"


@cache
def formats() -> dict[str, QuantFormat]:
    """Return all known formats by name: the built-in ones and those of entry point group ``nvfp4_prep.formats``."""
    found: dict[str, QuantFormat] = {}
    for kind in (ModelOpt(), CompressedTensors(), *_plugins(FORMAT_GROUP)):
        found[kind.name] = kind
    return found


@cache
def namings() -> tuple[ExpertNaming, ...]:
    """Return all known namings, those of entry point group ``nvfp4_prep.namings`` first."""
    return (*_plugins(NAMING_GROUP), PerExpertNaming(), ProjectionFirstNaming(), StackedNaming(), MoeStackNaming())


def _plugins(group: str) -> list[Any]:
    instances: list[Any] = []
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        try:
            instances.append(point.load()())
        except (ImportError, AttributeError, TypeError) as error:
            raise UsageError(
                f"plugin cannot be loaded ({error})",
                where=f"entry point {group}:{point.name} = {point.value}",
                next_step="Repair or uninstall the package that provides it.",
            ) from error
    return instances
