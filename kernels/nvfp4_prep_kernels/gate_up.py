"""Row order of the fused gate/up projection (w13).

The CuteDSL kernel reads gate and up rows in alternating blocks, up first, so that one output tile holds
both operands of SwiGLU. With block height ``B``, prepared row ``n`` (``b = n // (2*B)``, ``j = n % (2*B)``) is

    up row    B*b + j        if j <  B
    gate row  B*b + j - B    if j >= B

``B`` is 64 for FlashInfer 0.6.4 to 0.7.2; 32 and 16 are used by other kernels of the family.
"""

from __future__ import annotations

import torch

from nvfp4_prep_kernels.memory import Empty, new_empty

__all__ = ["deinterleave_gate_up", "interleave_gate_up", "join_alternating_rows", "split_alternating_rows"]


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor, block: int, empty: Empty = new_empty) -> torch.Tensor:
    """Interleave the rows of two projections, up first, in blocks of ``block`` rows.

    Args:
        gate: ``[..., I, C]``, any dtype.
        up: same shape and dtype as ``gate``.
        block: rows in one block; must divide ``I``.
        empty: makes the result's memory.

    Returns:
        ``[..., 2*I, C]``, contiguous.

    Raises:
        ValueError: if the shapes or dtypes differ or ``block`` does not divide ``I``.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype} {list(gate.shape)}, up is {up.dtype} {list(up.shape)}: must be equal")
    *lead, rows, cols = gate.shape
    if rows % block:
        raise ValueError(f"{rows} rows of a projection are not a multiple of the block height {block}")
    fused = empty((*lead, 2 * rows, cols), gate)
    pair = fused.view(*lead, rows // block, 2, block, cols)
    pair.select(-3, 0).copy_(up.reshape(*lead, rows // block, block, cols))
    pair.select(-3, 1).copy_(gate.reshape(*lead, rows // block, block, cols))
    return fused


def deinterleave_gate_up(
    fused: torch.Tensor, block: int, empty: Empty = new_empty
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inverse of :func:`interleave_gate_up`.

    Args:
        fused: ``[..., 2*I, C]``.
        block: rows in one block; must divide ``I``.
        empty: makes the results' memory.

    Returns:
        ``(gate, up)``, each ``[..., I, C]`` and contiguous.

    Raises:
        ValueError: if the rows are not a multiple of ``2 * block``.
    """
    *lead, rows, cols = fused.shape
    if rows % (2 * block):
        raise ValueError(f"{rows} fused rows are not a multiple of twice the block height {block}")
    pair = fused.reshape(*lead, rows // (2 * block), 2, block, cols)
    gate, up = (empty((*lead, rows // 2, cols), fused) for _ in range(2))
    for projection, number in ((gate, 1), (up, 0)):
        projection.view(*lead, rows // (2 * block), block, cols).copy_(pair.select(-3, number))
    return gate, up


def split_alternating_rows(fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split rows stored as ``[gate0, up0, gate1, up1, ...]`` (SWIGLUOAI checkpoints).

    Args:
        fused: ``[..., 2*I, C]``.

    Returns:
        ``(gate, up)``, each ``[..., I, C]`` and contiguous.
    """
    return fused[..., 0::2, :].contiguous(), fused[..., 1::2, :].contiguous()


def join_alternating_rows(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the inverse of :func:`split_alternating_rows`: ``[..., 2*I, C]``."""
    *lead, rows, cols = gate.shape
    return torch.stack((gate, up), dim=-2).reshape(*lead, 2 * rows, cols)
