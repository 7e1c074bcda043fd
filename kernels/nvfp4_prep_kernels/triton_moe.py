"""Fused MoE in Triton that reads the prepared layout in place, on any CUDA GPU from Ampere on.

No weight is un-prepared: the kernels find interleaved rows and swizzled scales by index arithmetic, so the bytes
that are tested are the bytes that a server will read. It is a means of proof, not of serving: the weights are
decoded to float16 and multiplied on the ordinary tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_prep_kernels.launching import on_device
from nvfp4_prep_kernels.moe_types import MoeActivation, MoeTokens, MoeTrace, PreparedExperts

__all__ = ["DOWN_TILE", "GATE_UP_TILE", "TritonMoe", "sort_pairs"]

_LARGE_ROWS = 64
_SMALL_ROWS = 16
"""Pairs of one tile; 16 is the least that a tensor core takes and wastes little where experts have few tokens."""
GATE_UP_TILE = {"BN": 64, "BK": 64, "num_warps": 4}
DOWN_TILE = {"BN": 128, "BK": 32, "num_warps": 4}
"""Output columns of a program, bytes of codes that one step of its loop takes from each row, and warps."""


@dataclass(frozen=True)
class TritonMoe:
    """The ``triton`` backend: float32 output, and the intermediate to look at."""

    name: str = "triton"
    out_dtype: torch.dtype = torch.float32

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        """See :class:`~nvfp4_prep_kernels.moe_types.MoeBackend`.

        Memory: ``T * k * (4 * Hp + 10 * Ip)`` bytes beside the output, NaN where nothing was written.
        """
        count = experts.w13_weight.shape[0]
        rows = _LARGE_ROWS if tokens.expert_ids.numel() >= 32 * count else _SMALL_ROWS
        tiles = _Tiles(rows, *sort_pairs(tokens.expert_ids, count, rows))
        scratch = _Scratch.allocate(tokens.expert_ids.numel(), experts, out.device)
        with on_device(out.device):
            _launch_gate_up(experts, tokens, activation, tiles, scratch)
            _launch_down(experts, tokens, tiles, scratch)
        torch.sum(scratch.contributions.view(-1, tokens.top_k, experts.padded_hidden), dim=1, out=out)
        return MoeTrace(scratch.hidden, scratch.quantized_in_order())


@dataclass(frozen=True)
class _Tiles:
    """The pairs as the kernels take them: what :func:`sort_pairs` gives for tiles of ``rows`` pairs."""

    rows: int
    sorted_pairs: torch.Tensor
    block_experts: torch.Tensor


@dataclass(frozen=True)
class _Scratch:
    """Memory that the kernels write.

    Attributes:
        hidden: ``float32 [T * k, Ip]``, the activation's output.
        quantized: ``float16 [T * k, 2, Ip/2]``, code * block scale of it: even channels, then odd ones.
        contributions: ``float32 [T * k, Hp]``, the second GEMM's output times the router's weight.
    """

    hidden: torch.Tensor
    quantized: torch.Tensor
    contributions: torch.Tensor

    @classmethod
    def allocate(cls, pairs: int, experts: PreparedExperts, device: torch.device) -> _Scratch:
        """Return memory filled with NaN, so that what a kernel leaves out is seen."""

        def nan(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full((pairs, *shape), torch.nan, dtype=dtype, device=device)

        inter = experts.padded_intermediate
        return cls(
            nan(torch.float32, inter), nan(torch.float16, 2, inter // 2), nan(torch.float32, experts.padded_hidden)
        )

    def quantized_in_order(self) -> torch.Tensor:
        """Return :attr:`quantized` in the channels' order: ``float32 [T * k, Ip]``."""
        return self.quantized.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(1)


def _launch_gate_up(
    experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, tiles: _Tiles, scratch: _Scratch
) -> None:
    from nvfp4_prep_kernels import triton_moe_kernels as kernels

    inter = experts.padded_intermediate
    kernels.gemm_gate_up[(len(tiles.block_experts), -(-inter // GATE_UP_TILE["BN"]))](
        tokens.codes,
        tokens.block_scales,
        experts.w13_weight,
        experts.w13_weight_scale,
        experts.w13_alpha,
        experts.w13_alpha_up,
        experts.fc2_inverse_scale,
        tiles.sorted_pairs,
        tiles.block_experts,
        scratch.quantized,
        scratch.hidden,
        activation.alpha,
        activation.beta,
        activation.limit,
        activation.situ_beta or 1.0,
        activation.situ_linear_beta or 0.0,
        HIDDEN=experts.padded_hidden,
        INTER=inter,
        TOP_K=tokens.top_k,
        BLOCK=experts.layout.interleaved_rows,
        SHUFFLED=experts.layout.shuffled,
        FUNCTION=activation.function.value,
        BM=tiles.rows,
        **GATE_UP_TILE,
    )


def _launch_down(experts: PreparedExperts, tokens: MoeTokens, tiles: _Tiles, scratch: _Scratch) -> None:
    from nvfp4_prep_kernels import triton_moe_kernels as kernels

    kernels.gemm_down[(len(tiles.block_experts), experts.padded_hidden // DOWN_TILE["BN"])](
        scratch.quantized,
        experts.w2_weight,
        experts.w2_weight_scale,
        experts.w2_alpha,
        tokens.weights,
        tiles.sorted_pairs,
        tiles.block_experts,
        scratch.contributions,
        HIDDEN=experts.padded_hidden,
        INTER=experts.padded_intermediate,
        SHUFFLED=experts.layout.shuffled,
        BM=tiles.rows,
        **DOWN_TILE,
    )


def sort_pairs(expert_ids: torch.Tensor, experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group (token, expert) pairs by expert, each group padded to whole tiles.

    Args:
        expert_ids: ``int32 [T, k]``; pair ``t * k + slot``.
        experts: E.
        rows: pairs of a tile.

    Returns:
        ``(pairs int32 [tiles * rows], experts int32 [tiles])``; -1 where a tile has no pair. Experts without
        tokens have no tile.
    """
    flat = expert_ids.flatten().long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    tiles = (counts + rows - 1) // rows
    first_pair = counts.cumsum(0) - counts
    first_slot = (tiles.cumsum(0) - tiles) * rows
    owner = flat[order]
    slot = first_slot[owner] + torch.arange(len(flat), device=flat.device) - first_pair[owner]
    sorted_pairs = torch.full((int(tiles.sum()) * rows,), -1, dtype=torch.int32, device=flat.device)
    sorted_pairs[slot] = order.to(torch.int32)
    return sorted_pairs, torch.repeat_interleave(torch.arange(experts, device=flat.device), tiles).to(torch.int32)
