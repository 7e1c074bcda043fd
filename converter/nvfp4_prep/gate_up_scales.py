"""One global scale for gate and up, where the source has two.

The kernel multiplies both projections with one alpha, so ``code * block_scale * global_scale`` must be kept while the
global scales become equal. With ratio ``r = own / other`` every block scale of one side becomes ``e4m3(block_scale *
r)``; a power of two is exact unless it underflows. The codes are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_prep_kernels import Projection

__all__ = ["E4M3_MAX", "Reconciled", "reconcile", "rescale"]

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Reconciled:
    """The outcome for one expert.

    Attributes:
        side: the projection whose block scales change.
        block_scales: its new scales, ``uint8 [I, H/16]`` (e4m3 bytes), row-major.
        global_scale: the scale of both projections from now on.
        rounded: how many block scales do not keep their value exactly.
        underflowed: how many of them became zero.
        worst_relative: largest relative change of a block scale that did not underflow.
        worst_absolute: largest change of ``block_scale * global_scale``, the step of one code.
    """

    side: Projection
    block_scales: torch.Tensor
    global_scale: float
    rounded: int
    underflowed: int
    worst_relative: float
    worst_absolute: float


def rescale(block_scales: torch.Tensor, own: float, other: float) -> torch.Tensor | None:
    """Block scales for another global scale.

    Args:
        block_scales: ``uint8``, e4m3 bytes.
        own: the global scale that they belong to.
        other: the one that they shall belong to.

    Returns:
        ``uint8`` of the same shape, rounded to the nearest e4m3 value; ``None`` if a value would pass the largest, 448.
    """
    if other == 0.0:
        return None
    scaled = block_scales.view(torch.float8_e4m3fn).to(torch.float64) * (own / other)
    if bool((scaled.abs() > E4M3_MAX).any()):
        return None
    return scaled.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)


def reconcile(gate: torch.Tensor, up: torch.Tensor, gate_scale: float, up_scale: float) -> Reconciled:
    """Brings both projections of one expert to one global scale.

    Both directions are tried; the one that changes fewer block scales wins, then the one with the smaller worst change.
    Rescaling the side with the smaller global scale can never overflow, so one direction always exists.

    Args:
        gate, up: ``uint8 [I, H/16]``, e4m3 bytes, row-major.
        gate_scale, up_scale: their global scales, not both zero.
    """
    options = []
    for side, scales, own, other in (
        (Projection.GATE, gate, gate_scale, up_scale),
        (Projection.UP, up, up_scale, gate_scale),
    ):
        changed = rescale(scales, own, other)
        if changed is not None:
            options.append(_judge(side, scales, changed, own, other))
    return min(options, key=lambda option: (option.rounded, option.worst_absolute, -option.global_scale))


def _judge(side: Projection, before: torch.Tensor, after: torch.Tensor, own: float, other: float) -> Reconciled:
    old = before.view(torch.float8_e4m3fn).to(torch.float64) * own
    new = after.view(torch.float8_e4m3fn).to(torch.float64) * other
    change = (new - old).abs()
    lost = (new == 0) & (old != 0)
    kept = (old != 0) & ~lost
    relative = change[kept] / old[kept].abs()
    return Reconciled(
        side=side,
        block_scales=after,
        global_scale=other,
        rounded=int((change != 0).sum()),
        underflowed=int(lost.sum()),
        worst_relative=float(relative.max()) if relative.numel() else 0.0,
        worst_absolute=float(change.max()) if change.numel() else 0.0,
    )
