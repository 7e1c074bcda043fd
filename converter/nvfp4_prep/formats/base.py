"""Protocols of quantization formats and tensor namings, which keep the knowledge of model families out of the core.

A *naming* reads tensor names: which layer, which expert, which projections, which leaf. A *format* knows what the
leaves are called and how global scales are meant. Detection looks at the tensors that are there, never at ignore lists:
real exporters write wrong ones.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from nvfp4_prep_kernels import Projection

__all__ = ["ExpertNaming", "ExpertTensorName", "Leaf", "QuantFormat"]


class Leaf(enum.StrEnum):
    """The tensors of one NVFP4 linear layer."""

    CODES = "codes"
    BLOCK_SCALE = "block_scale"
    GLOBAL_SCALE = "global_scale"
    INPUT_SCALE = "input_scale"

    @property
    def is_scalar(self) -> bool:
        """Whether one expert has one float32 (else a matrix)."""
        return self in (Leaf.GLOBAL_SCALE, Leaf.INPUT_SCALE)


@dataclass(frozen=True, slots=True)
class ExpertTensorName:
    """A tensor name, understood.

    Attributes:
        experts: module path of the routed experts, e.g. ``model.layers.1.mlp.experts``: where the serving framework has
            them, and what the prepared tensors' names start with.
        expert: number of the expert; ``None`` for a tensor that stacks all experts.
        projections: what the tensor holds, in the order of its rows.
        leaf: spelling of the leaf as the format has it, e.g. ``weight_scale_2``.
        alternating: whether the rows of a tensor that holds gate and up alternate one by one (``[gate0, up0, gate1,
            …]``) or are ``[gate; up]``; ``None`` where the model's activation decides.
    """

    experts: str
    expert: int | None
    projections: tuple[Projection, ...]
    leaf: str
    alternating: bool | None = None


class ExpertNaming(Protocol):
    """A recognition of routed experts' tensors by their names.

    Attributes:
        name: unique; recorded in the manifest.
    """

    name: str

    def parse(self, tensor: str) -> ExpertTensorName | None:
        """Return the parts of a name, or ``None`` if it is not a tensor of a routed expert in this naming."""
        ...


class QuantFormat(Protocol):
    """A quantization format's leaves and scale conventions.

    Attributes:
        name: unique; recorded in the manifest.
        leaves: spelling to meaning. A format is recognised by its spelling of the global scale.
    """

    name: str
    leaves: Mapping[str, Leaf]

    def global_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the multipliers of stored weight global scales (weight = code * block scale * multiplier).

        Args:
            stored: ``float32``, any shape.

        Returns:
            ``float32`` of the same shape.
        """
        ...

    def input_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the multipliers of stored activation global scales; same shapes as above."""
        ...
