"""Tensor names of routed experts, as public checkpoints spell them."""

from __future__ import annotations

import re

from nvfp4_prep.formats.base import ExpertTensorName
from nvfp4_prep_kernels import Projection

__all__ = ["PROJECTIONS", "MoeStackNaming", "PerExpertNaming", "ProjectionFirstNaming", "StackedNaming"]

PROJECTIONS = {
    "gate_proj": Projection.GATE,
    "up_proj": Projection.UP,
    "down_proj": Projection.DOWN,
    "w1": Projection.GATE,
    "w3": Projection.UP,
    "w2": Projection.DOWN,
}
"""Spelling to projection."""
_STACKS = {
    "gate_up_proj": (Projection.GATE, Projection.UP),
    "gate_proj": (Projection.GATE,),
    "up_proj": (Projection.UP,),
    "down_proj": (Projection.DOWN,),
}
_OF_ONE_EXPERT = {
    "gate_up_proj": (Projection.GATE, Projection.UP),
    "w13": (Projection.GATE, Projection.UP),
    **{spelling: (projection,) for spelling, projection in PROJECTIONS.items()},
}
"""Spelling to projections in the order of the rows; the fused ones as vLLM's RoutedExperts.load_weights has them."""
_EXPERTS = r"(?P<experts>(?:[^\0]*\.)?experts)"
_NUMBER = r"(?P<expert>0|[1-9][0-9]{0,5})"
_PROJECTION = rf"(?P<projection>{'|'.join(_OF_ONE_EXPERT)})"


class PerExpertNaming:
    """``….experts.E.{gate,up,down}_proj.LEAF`` and ``….experts.E.{w1,w3,w2}.LEAF``.

    Covers DeepSeek, Kimi, GLM, Qwen3, ERNIE, Hunyuan, Mixtral, MiniMax, Nemotron-3, Mistral-Large-3 and Step-3.5 as
    llm-compressor writes it. Shared experts (``shared_experts``, ``shared_expert``, ``share_expert``) are other path
    components and do not match. ``E.gate_up_proj`` and ``E.w13`` hold gate and up of one expert, gate rows first unless
    the activation says that rows alternate; their global scales serve both.
    """

    name = "per-expert"
    _pattern = re.compile(rf"{_EXPERTS}\.{_NUMBER}\.{_PROJECTION}\.(?P<leaf>[A-Za-z0-9_.]+)")

    def parse(self, tensor: str) -> ExpertTensorName | None:
        """See :class:`~nvfp4_prep.formats.base.ExpertNaming`."""
        return _of_one_expert(self._pattern.fullmatch(tensor))


class ProjectionFirstNaming:
    """``….experts.{gate,up,down}_proj.E.LEAF``: ModelOpt 0.43's export of Qwen3-VL-MoE; else as per-expert names."""

    name = "projection-first"
    _pattern = re.compile(rf"{_EXPERTS}\.{_PROJECTION}\.{_NUMBER}\.(?P<leaf>[A-Za-z0-9_.]+)")

    def parse(self, tensor: str) -> ExpertTensorName | None:
        """See :class:`~nvfp4_prep.formats.base.ExpertNaming`."""
        return _of_one_expert(self._pattern.fullmatch(tensor))


def _of_one_expert(match: re.Match[str] | None) -> ExpertTensorName | None:
    if match is None:
        return None
    projections = _OF_ONE_EXPERT[match["projection"]]
    return ExpertTensorName(match["experts"], int(match["expert"]), projections, match["leaf"])


class StackedNaming:
    """``….experts.{gate_up,gate,up,down}_proj``: one tensor for all experts, as transformers has them (Llama-4).

    The codes' name is the bare projection; the other leaves follow after an underscore (ModelOpt) or a dot. Whether a
    stack is transposed and whether its gate and up rows alternate is not in the names: shapes and the activation say.
    A number after the projection is an expert's, not the beginning of a leaf.
    """

    name = "stacked"
    _pattern = re.compile(
        rf"{_EXPERTS}\.(?P<projection>{'|'.join(_STACKS)})(?:[._](?P<leaf>(?![0-9]+\.)[A-Za-z0-9_.]+))?"
    )

    def parse(self, tensor: str) -> ExpertTensorName | None:
        """See :class:`~nvfp4_prep.formats.base.ExpertNaming`."""
        match = self._pattern.fullmatch(tensor)
        if match is None:
            return None
        return ExpertTensorName(match["experts"], None, _STACKS[match["projection"]], match["leaf"] or "weight")


class MoeStackNaming:
    """``….moe.{gate,up,down}_proj.LEAF``: Step-3.5, whose experts are stacked ``[E, out, in]`` beside the router.

    vLLM has them as ``….moe.experts``, which is where the prepared tensors go.
    """

    name = "moe-stack"
    _pattern = re.compile(rf"(?P<moe>(?:[^\0]*\.)?moe)\.(?P<projection>{'|'.join(_STACKS)})\.(?P<leaf>[A-Za-z0-9_.]+)")

    def parse(self, tensor: str) -> ExpertTensorName | None:
        """See :class:`~nvfp4_prep.formats.base.ExpertNaming`."""
        match = self._pattern.fullmatch(tensor)
        if match is None:
            return None
        return ExpertTensorName(f"{match['moe']}.experts", None, _STACKS[match["projection"]], match["leaf"])
