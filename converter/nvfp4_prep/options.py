"""The options that decide which bytes a conversion writes. Everything else (threads, progress, device) does not."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nvfp4_prep._util.arguments import check_fields, integer, member, one_number_of
from nvfp4_prep.errors import UsageError
from nvfp4_prep.layouts import GATE_UP_BLOCKS, LAYOUTS, LayoutName

if TYPE_CHECKING:
    from nvfp4_prep_kernels import MoeLayout

__all__ = ["GATE_UP_BLOCK", "LAYOUT", "MAX_MOE_TP", "MOE_TP", "ConvertOptions", "GateUpPolicy", "LayoutName"]

MAX_MOE_TP = 1024
"""Largest tensor-parallel size to pad for."""


LAYOUT, GATE_UP_BLOCK, MOE_TP = member(LayoutName), one_number_of(*sorted(GATE_UP_BLOCKS)), integer(1, MAX_MOE_TP)
"""Kinds of the options that say which layout; ``relayout`` takes them one by one."""


class GateUpPolicy(enum.StrEnum):
    """Treatment of experts whose gate and up projections have different global scales.

    The CuteDSL kernels have one scale for both. ``reconcile`` rescales one side's block scales, ``vllm`` takes gate's
    scale for both as vLLM does, ``error`` refuses. The TRTLLM-gen kernels have one for each, so that ``reconcile`` has
    nothing to rescale there: both scales are stored.
    """

    RECONCILE = "reconcile"
    VLLM = "vllm"
    ERROR = "error"


@dataclass(frozen=True)
class ConvertOptions:
    """Options that the output's bytes depend on; a resumed conversion must have the same.

    Attributes:
        layout: which kernel's layout. The default is CuteDSL's; a B200 server without flags runs TRTLLM-gen.
        gate_up_block: rows in one gate/up block (16, 32 or 64) of the layout ``cutedsl``; the others have none.
        gate_up_scales: see :class:`GateUpPolicy`.
        moe_tp: tensor-parallel size to pad for.
    """

    layout: LayoutName = LayoutName.CUTEDSL
    gate_up_block: int = GATE_UP_BLOCKS[0]
    gate_up_scales: GateUpPolicy = GateUpPolicy.RECONCILE
    moe_tp: int = 1

    def __post_init__(self) -> None:
        check_fields(
            self,
            layout=LAYOUT,
            gate_up_block=GATE_UP_BLOCK,
            gate_up_scales=member(GateUpPolicy),
            moe_tp=MOE_TP,
        )
        facts = LAYOUTS[self.layout]
        if not facts.has_blocks and self.gate_up_block != GATE_UP_BLOCKS[0]:
            raise UsageError(
                f"the {facts.kernel} layout has no gate/up blocks whose height can be chosen",
                expected="no --gate-up-block",
                actual=self.gate_up_block,
            )
        self.layout_for(gated=True)

    def layout_for(self, *, gated: bool) -> MoeLayout:
        """Return the layout of a layer.

        Raises:
            UsageError: if the options do not make a layout, or the layout has no such layers.
        """
        from nvfp4_prep_kernels import LayoutError, MoeLayout  # imports torch; `convert --help` needs the names only

        try:
            return MoeLayout.named(self.layout, gated=gated, gate_up_block=self.gate_up_block, moe_tp=self.moe_tp)
        except LayoutError as error:
            raise UsageError(str(error)) from error

    @property
    def gives_scales_up(self) -> bool:
        """Whether gate and up get one global scale where the source has two; else both are stored."""
        return self.gate_up_scales is GateUpPolicy.VLLM or not self.layout_for(gated=True).takes_two_w13_scales

    def reconciled(self, differing: tuple[int, ...]) -> tuple[int, ...]:
        """Return, of the experts whose gate and up scales differ, those whose block scales are rescaled."""
        return differing if self.gate_up_scales is GateUpPolicy.RECONCILE and self.gives_scales_up else ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {key: str(value) if isinstance(value, enum.Enum) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ConvertOptions:
        """Invert :meth:`to_dict`; raise ``KeyError``, ``ValueError`` or :class:`UsageError` for anything else."""
        return cls(
            layout=LayoutName(value["layout"]),
            gate_up_block=int(value["gate_up_block"]),
            gate_up_scales=GateUpPolicy(value["gate_up_scales"]),
            moe_tp=int(value["moe_tp"]),
        )
