"""compressed-tensors' ``nvfp4-pack-quantized`` (llm-compressor): global scales are stored as reciprocals."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nvfp4_prep.formats.base import Leaf

__all__ = ["CompressedTensors"]


class CompressedTensors:
    """Leaves ``weight_packed``, ``weight_scale``, ``weight_global_scale`` and ``input_global_scale``.

    Each stored value is inverted by itself in float32, as vLLM does, before anything else is done with it: the
    maximum of inverses and the inverse of a minimum differ in the last bit for some values.
    """

    name = "compressed-tensors"
    leaves: Mapping[str, Leaf] = {
        "weight_packed": Leaf.CODES,
        "weight_scale": Leaf.BLOCK_SCALE,
        "weight_global_scale": Leaf.GLOBAL_SCALE,
        "input_global_scale": Leaf.INPUT_SCALE,
    }

    def global_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """Return ``1 / stored`` in float32."""
        return 1.0 / stored

    def input_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """Return ``1 / stored`` in float32."""
        return 1.0 / stored
