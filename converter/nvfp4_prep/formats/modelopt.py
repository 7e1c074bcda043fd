"""NVIDIA ModelOpt's NVFP4: global scales are stored as multipliers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nvfp4_prep.formats.base import Leaf

__all__ = ["ModelOpt"]


class ModelOpt:
    """Leaves ``weight``, ``weight_scale``, ``weight_scale_2`` and ``input_scale``."""

    name = "modelopt"
    leaves: Mapping[str, Leaf] = {
        "weight": Leaf.CODES,
        "weight_scale": Leaf.BLOCK_SCALE,
        "weight_scale_2": Leaf.GLOBAL_SCALE,
        "input_scale": Leaf.INPUT_SCALE,
    }

    def global_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the stored values: ModelOpt stores multipliers."""
        return stored

    def input_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the stored values: ModelOpt stores multipliers."""
        return stored
