"""One global scale for gate and up, where the source has two.

The kernel multiplies both projections with one alpha, so ``code * block_scale * global_scale`` must be kept while the
global scales become equal. With ratio ``r = own / other`` every block scale of one side becomes ``e4m3(block_scale *
r)``; a power of two is exact unless it underflows. The codes are never touched.

A block scale has 256 possible bytes, so everything is worked out on a table of 256 values and counted with
histograms: exact, the same on every machine, and about 30 ms for an expert of Kimi-K2.5 where arithmetic on each
block took 1.6 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nvfp4_prep.moe.policy_errors import PolicyErrors
from nvfp4_prep.moe.scalars import LayerScalars
from nvfp4_prep_kernels import BLOCK_COLS, Projection
from nvfp4_prep_kernels.nvfp4 import E4M3_MAX, decode_codes

__all__ = ["Reconciled", "measure", "reconcile", "reconcile_expert", "rescale"]

_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).nan_to_num(0.0)
"""Value of each e4m3 byte; the two NaN bytes, which no quantizer writes, count as 0."""
_NAN_BYTES = (0x7F, 0xFF)
_BYTE_ENERGY = decode_codes(torch.arange(256, dtype=torch.uint8).unsqueeze(1)).square().sum(1)
_PAIR_ENERGY = (_BYTE_ENERGY[None, :] + _BYTE_ENERGY[:, None]).reshape(65536)
"""Sum of the squares of the four codes in two bytes: multiples of 0.25, so that sums of them are exact."""


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
    """Return the block scales for another global scale.

    Args:
        block_scales: ``uint8``, e4m3 bytes.
        own: the global scale that they belong to.
        other: the one that they shall belong to.

    Returns:
        ``uint8`` of the same shape, rounded to the nearest e4m3 value (ties to even); ``None`` if a value would pass
        the largest, 448.
    """
    table = _rescaled_bytes(_counts(block_scales) > 0, own, other)
    return None if table is None else _look_up(table, block_scales)


def reconcile(gate: torch.Tensor, up: torch.Tensor, gate_scale: float, up_scale: float) -> Reconciled:
    """Bring both projections of one expert to one global scale.

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
        counts = _counts(scales)
        table = _rescaled_bytes(counts > 0, own, other)
        if table is not None:
            options.append((*_judge(counts, table, own, other), -other, side, scales, table))
    rounded, worst_absolute, underflowed, worst_relative, negative, side, scales, table = min(
        options, key=lambda option: (option[0], option[1], option[4])
    )
    return Reconciled(side, _look_up(table, scales), -negative, rounded, underflowed, worst_relative, worst_absolute)


def reconcile_expert(scalars: LayerScalars, expert: int, gate: torch.Tensor, up: torch.Tensor) -> Reconciled:
    """Return :func:`reconcile` with the layer's scalars; gate and up are block scales, ``uint8 [I, H/16]``."""
    gates = scalars.gate_scale_2 or scalars.up_scale_2
    return reconcile(gate, up, gates[expert], scalars.up_scale_2[expert])


def _counts(block_scales: torch.Tensor) -> torch.Tensor:
    """Count how often each byte occurs: ``int64 [256]``."""
    return torch.bincount(block_scales.reshape(-1), minlength=256)


def _look_up(table: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, block_scales.reshape(-1).to(torch.int32)).view(block_scales.shape)


def _rescaled_bytes(present: torch.Tensor, own: float, other: float) -> torch.Tensor | None:
    """Return the new byte of each byte, ``uint8 [256]``; ``None`` if one that is present would pass 448."""
    if other == 0.0:
        return None
    scaled = _E4M3 * (own / other)
    if bool((scaled.abs() > E4M3_MAX)[present].any()):
        return None
    table = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    for byte in _NAN_BYTES:
        table[byte] = byte
    return table


def _judge(counts: torch.Tensor, table: torch.Tensor, own: float, other: float) -> tuple[int, float, int, float]:
    """Return the blocks rounded, worst absolute change, blocks underflowed, worst relative change of the others."""
    old, new = _E4M3 * own, _E4M3[table.to(torch.int64)] * other
    present = counts > 0
    change = torch.where(present, (new - old).abs(), 0.0)
    lost = present & (new == 0) & (old != 0)
    kept = present & (old != 0) & ~lost
    relative = change[kept] / old[kept].abs()
    return (
        int(counts[change != 0].sum()),
        float(change.max()),
        int(counts[lost].sum()),
        float(relative.max()) if relative.numel() else 0.0,
    )


def measure(
    codes: tuple[torch.Tensor, torch.Tensor],
    block_scales: tuple[torch.Tensor, torch.Tensor],
    global_scales: tuple[float, float],
    outcome: Reconciled,
) -> PolicyErrors:
    """Return the errors of one expert under all policies, from its codes and block scales.

    A weight is ``code * block_scale * global_scale``, and only the two scales change, so the squared error of a block
    is the sum of its squared codes times the squared change of ``block_scale * global_scale``.

    Args:
        codes: gate and up, ``uint8 [I, H/2]``.
        block_scales: gate and up, ``uint8 [I, H/16]``, row-major, as the source has them.
        global_scales: gate's and up's.
        outcome: what :func:`reconcile` made of them.
    """
    source, reconciled, vllm = [], [], []
    for side, code, scales, own in zip(
        (Projection.GATE, Projection.UP), codes, block_scales, global_scales, strict=True
    ):
        energy = torch.bincount(scales.reshape(-1), weights=_block_energy(code), minlength=256).tolist()
        served = _E4M3 * own
        if side is outcome.side:
            table = _rescaled_bytes(_counts(scales) > 0, own, outcome.global_scale)
            if table is not None:
                served = _E4M3[table.to(torch.int64)] * outcome.global_scale
        for weight, value, new in zip(energy, _E4M3.tolist(), served.tolist(), strict=True):
            source.append(weight * (value * own) ** 2)
            reconciled.append(weight * (new - value * own) ** 2)
            vllm.append(weight * (value * (global_scales[0] - own)) ** 2)
    return PolicyErrors(math.fsum(source), math.fsum(reconciled), math.fsum(vllm))


def _block_energy(codes: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squared codes of each block of 16: ``float64 [blocks]``, exact."""
    pairs = codes.contiguous().reshape(-1).view(torch.uint16).to(torch.int32)
    return _PAIR_ENERGY.index_select(0, pairs).view(-1, BLOCK_COLS // 4).sum(-1).to(torch.float64)
