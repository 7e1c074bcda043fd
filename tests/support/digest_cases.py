"""Recorded entries of servers' own preparations: the layer, its layout, and the rank's share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from data.synthetic_layers import SyntheticLayer
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor

__all__ = ["LEAF", "Case", "assert_recorded", "prepared", "source"]

LEAF = {True: "weight_scale", False: "weight"}


@dataclass(frozen=True)
class Case:
    """A recorded entry: which layer, which layout, which share of it."""

    layer: SyntheticLayer
    layout: MoeLayout
    tp: tuple[int, int]
    record: dict[str, Any]

    @property
    def dims(self) -> MoeDims:
        return MoeDims(self.layer.experts, self.layer.intermediate, self.layer.hidden)


def source(layer: SyntheticLayer, expert: int, projection: str, leaf: str, tp: tuple[int, int]) -> torch.Tensor:
    """One projection's bytes, the rank's share of I already cut out."""
    made = layer.tensor(expert, projection, leaf)
    matrix = torch.frombuffer(bytearray(made.data), dtype=torch.uint8).reshape(made.shape)
    return matrix.chunk(tp[0], dim=1 if projection == "down_proj" else 0)[tp[1]].contiguous()


def prepared(case: Case, tensor: PreparedTensor, tp: tuple[int, int]) -> torch.Tensor:
    """All experts of one prepared tensor, made from the share ``tp`` of the source."""
    layer = case.layer
    names = [f"{projection}_proj" for projection in case.layout.projections(tensor)]
    leaf = LEAF[tensor.is_scale]
    return torch.stack(
        [case.layout.apply(tensor, *(source(layer, e, name, leaf, tp) for name in names)) for e in range(layer.experts)]
    )


def assert_recorded(made: torch.Tensor, expected: dict[str, Any]) -> None:
    """Compare shape and digest."""
    assert list(made.shape) == expected["shape"]
    assert hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest() == expected["sha256"]
