"""Fused MoE in Triton that reads the prepared layout in place, on any CUDA card from Ampere on.

No weight is un-prepared: the kernels find interleaved rows and swizzled scales by index arithmetic, so the bytes
that are tested are the bytes that a server will read. It is a means of proof, not of serving: the weights are
decoded to float16 and multiplied on the ordinary tensor cores.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from nvfp4_prep_kernels.moe_types import MoeActivation, MoeTokens, MoeTrace, PreparedExperts

__all__ = ["TritonMoe"]

_LARGE_ROWS = 64
_SMALL_ROWS = 16
"""Pairs of one tile; 16 is the least that a tensor core takes and wastes little where experts have few tokens."""


@dataclass(frozen=True)
class TritonMoe:
    """The ``triton`` backend: float32 output, and the intermediate to look at."""

    name: str = "triton"
    out_dtype: torch.dtype = torch.float32

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        """See :class:`~nvfp4_prep_kernels.moe_types.MoeBackend`.

        Memory: ``T * k * (4 * Hp + 8 * Ip)`` bytes beside the output, NaN where nothing was written.
        """
        from nvfp4_prep_kernels import triton_moe_kernels as kernels

        device = out.device
        hidden, inter = experts.padded_hidden, experts.padded_intermediate
        pairs = tokens.expert_ids.numel()
        rows = _LARGE_ROWS if pairs >= 32 * experts.w13_weight.shape[0] else _SMALL_ROWS
        sorted_pairs, block_experts = sort_pairs(tokens.expert_ids, experts.w13_weight.shape[0], rows)
        halves = torch.full((pairs, inter), torch.nan, dtype=torch.float16, device=device)
        hidden_values = torch.full((pairs, inter), torch.nan, dtype=torch.float32, device=device)
        contributions = torch.full((pairs, hidden), torch.nan, dtype=torch.float32, device=device)
        channels = 64
        layout = experts.layout
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernels.gemm_gate_up[(len(block_experts), -(-inter // channels))](
                tokens.codes,
                tokens.block_scales,
                experts.w13_weight,
                experts.w13_weight_scale,
                experts.w13_alpha,
                experts.fc2_inverse_scale,
                sorted_pairs,
                block_experts,
                halves,
                hidden_values,
                activation.alpha,
                activation.beta,
                activation.limit,
                activation.situ_beta or 1.0,
                activation.situ_linear_beta or 0.0,
                HIDDEN=hidden,
                INTER=inter,
                TOP_K=tokens.top_k,
                BLOCK=layout.gate_up_block if layout.gated and layout.interleaved else 0,
                FUNCTION=activation.function.value,
                BM=rows,
                BN=channels,
                BK=64,
                num_warps=4,
            )
            kernels.gemm_down[(len(block_experts), hidden // 128)](
                halves,
                experts.w2_weight,
                experts.w2_weight_scale,
                experts.w2_alpha,
                tokens.weights,
                sorted_pairs,
                block_experts,
                contributions,
                HIDDEN=hidden,
                INTER=inter,
                BM=rows,
                BN=128,
                BK=32,
                num_warps=4,
            )
        torch.sum(contributions.view(-1, tokens.top_k, hidden), dim=1, out=out)
        return MoeTrace(hidden_values, halves.view(pairs, 2, inter // 2).transpose(1, 2).reshape(pairs, inter).float())


def sort_pairs(expert_ids: torch.Tensor, experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups (token, expert) pairs by expert, each group padded to whole tiles.

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
