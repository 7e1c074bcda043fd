"""Names and sizes of one MoE layer's tensors, the same in every layout."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

__all__ = [
    "BLOCK_COLS",
    "SCALE_VECTORS",
    "UP_SCALE_VECTOR",
    "LayoutError",
    "MoeDims",
    "PreparedTensor",
    "Projection",
]

BLOCK_COLS = 16
"""Columns that share one block scale (NVFP4)."""
SCALE_VECTORS = ("w13_weight_scale_2", "w2_weight_scale_2", "w13_input_scale", "w2_input_scale")
"""The float32 ``[E]`` tensors of a prepared layer, beside the four big ones (:class:`PreparedTensor`)."""
UP_SCALE_VECTOR = "w13_weight_scale_2_up"
"""A fifth float32 ``[E]`` tensor: up's global scale where it may differ from gate's (w13_weight_scale_2 then)."""


class LayoutError(ValueError):
    """A layer, a slice or a parameter that this layout cannot represent; the message says why and what would fit."""


class Projection(enum.StrEnum):
    """The linear layers of one expert."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


class PreparedTensor(enum.StrEnum):
    """The four big tensors of one prepared MoE layer, in the order in which a file holds them."""

    W13_WEIGHT = "w13_weight"
    W13_WEIGHT_SCALE = "w13_weight_scale"
    W2_WEIGHT = "w2_weight"
    W2_WEIGHT_SCALE = "w2_weight_scale"

    @property
    def is_scale(self) -> bool:
        """Whether the tensor holds block scales (else codes)."""
        return self in (PreparedTensor.W13_WEIGHT_SCALE, PreparedTensor.W2_WEIGHT_SCALE)

    @property
    def is_w13(self) -> bool:
        """Whether the tensor holds the fused gate/up projection (else down)."""
        return self in (PreparedTensor.W13_WEIGHT, PreparedTensor.W13_WEIGHT_SCALE)

    @property
    def dtype(self) -> str:
        """The stored dtype by its safetensors name."""
        return "F8_E4M3" if self.is_scale else "U8"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of a server's parameter: one byte an element, as in the file."""
        return torch.float8_e4m3fn if self.is_scale else torch.uint8

    @property
    def cols_per_byte(self) -> int:
        """Columns of the matrix that one byte stands for."""
        return BLOCK_COLS if self.is_scale else 2


@dataclass(frozen=True)
class MoeDims:
    """Sizes of one MoE layer as the source has them: ``experts`` E, ``intermediate`` I and ``hidden`` H."""

    experts: int
    intermediate: int
    hidden: int
