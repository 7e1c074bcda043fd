"""Example plugin: the (invented) Acme models, with names and leaves of their own.

``decoder.3.bank.7.gate.q`` holds the codes of expert 7 of layer 3; ``s`` are its block scales, ``g`` its global scale
in bits (a base-2 logarithm) and ``a`` that of its activations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from nvfp4_prep.formats import ExpertTensorName, Leaf
from nvfp4_prep_kernels import Projection

__all__ = ["AcmeFormat", "AcmeNaming"]

_PROJECTIONS = {"gate": Projection.GATE, "value": Projection.UP, "out": Projection.DOWN}


class AcmeNaming:
    """``decoder.L.bank.E.{gate,value,out}.LEAF``; a server has the experts as ``decoder.L.bank``."""

    name = "acme"
    _pattern = re.compile(
        r"(?P<experts>decoder\.[0-9]+\.bank)\.(?P<expert>0|[1-9][0-9]*)\.(?P<projection>gate|value|out)\.(?P<leaf>[a-z]+)"
    )

    def parse(self, tensor: str) -> ExpertTensorName | None:
        """The parts of a name, or ``None`` for every tensor that is no routed expert's."""
        match = self._pattern.fullmatch(tensor)
        if match is None:
            return None
        projection = _PROJECTIONS[match["projection"]]
        return ExpertTensorName(match["experts"], int(match["expert"]), (projection,), match["leaf"])


class AcmeFormat:
    """NVFP4 with global scales stored as base-2 logarithms."""

    name = "acme"
    leaves: Mapping[str, Leaf] = {
        "q": Leaf.CODES,
        "s": Leaf.BLOCK_SCALE,
        "g": Leaf.GLOBAL_SCALE,
        "a": Leaf.INPUT_SCALE,
    }

    def global_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """``2 ** stored``."""
        return torch.exp2(stored)

    def input_scale_multiplier(self, stored: torch.Tensor) -> torch.Tensor:
        """``2 ** stored``."""
        return torch.exp2(stored)
