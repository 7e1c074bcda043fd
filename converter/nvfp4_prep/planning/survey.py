"""The first look at a checkpoint: its index and its MoE layers, by headers and configs alone."""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_prep.checkpoint.index import CheckpointIndex, read_index
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.moe.config_fit import classify_layers
from nvfp4_prep.moe.discovery import FoundLayers

__all__ = ["Survey", "survey"]


@dataclass(frozen=True)
class Survey:
    """A checkpoint's index and its MoE layers, by headers and configs alone."""

    index: CheckpointIndex
    found: FoundLayers


def survey(source: Source) -> Survey:
    """Read headers and configs; raises :class:`SourceError` if they cannot be read."""
    index = read_index(source)
    return Survey(index, classify_layers(index))
