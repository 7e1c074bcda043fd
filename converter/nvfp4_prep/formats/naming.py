"""Tensor names of routed experts, as public checkpoints spell them."""

from __future__ import annotations

import re

from nvfp4_prep.formats.base import ExpertTensorName
from nvfp4_prep_kernels import Projection

__all__ = ["PROJECTIONS", "PerExpertNaming"]

PROJECTIONS = {
    "gate_proj": Projection.GATE,
    "up_proj": Projection.UP,
    "down_proj": Projection.DOWN,
    "w1": Projection.GATE,
    "w3": Projection.UP,
    "w2": Projection.DOWN,
}
"""Spelling to projection."""


class PerExpertNaming:
    """``….experts.E.{gate,up,down}_proj.LEAF`` and ``….experts.E.{w1,w3,w2}.LEAF``.

    Covers DeepSeek, Kimi, GLM, Qwen3, ERNIE, Hunyuan, Mixtral, MiniMax, Nemotron-3 and Mistral-Large-3. Shared experts
    (``shared_experts``, ``shared_expert``, ``share_expert``) are other path components and do not match.
    """

    name = "per-expert"
    _pattern = re.compile(
        r"(?P<experts>(?:[^\0]*\.)?experts)\.(?P<expert>0|[1-9][0-9]{0,5})\."
        rf"(?P<projection>{'|'.join(PROJECTIONS)})\.(?P<leaf>[A-Za-z0-9_.]+)"
    )

    def parse(self, tensor: str) -> ExpertTensorName | None:
        """See :class:`~nvfp4_prep.formats.base.ExpertNaming`."""
        match = self._pattern.fullmatch(tensor)
        if match is None:
            return None
        projection = PROJECTIONS[match["projection"]]
        return ExpertTensorName(match["experts"], int(match["expert"]), (projection,), match["leaf"])
