"""Fused MoE in torch that reads the prepared layout in place, for machines without a GPU.

Rows and scales are gathered by the published index formulas, written out here on their own: nothing of the code
that prepared the bytes is used to read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_prep_kernels.moe_types import MoeActivation, MoeTokens, MoeTrace, PreparedExperts
from nvfp4_prep_kernels.nvfp4 import decode, quantize

__all__ = ["TorchMoe"]


@dataclass(frozen=True)
class TorchMoe:
    """The ``torch`` backend: float32 output, one expert at a time; peak memory is one decoded expert in float32."""

    name: str = "torch"
    out_dtype: torch.dtype = torch.float32

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        """See :class:`~nvfp4_prep_kernels.moe_types.MoeBackend`."""
        hidden, inter = experts.padded_hidden, experts.padded_intermediate
        pairs = tokens.expert_ids.numel()
        x = decode(tokens.codes, tokens.block_scales)
        contributions = torch.full((pairs, hidden), torch.nan, device=out.device)
        hidden_values = torch.full((pairs, inter), torch.nan, device=out.device)
        quantized = torch.full((pairs, inter), torch.nan, device=out.device)
        flat = tokens.expert_ids.flatten()
        inverse = float(experts.fc2_inverse_scale)
        up_rows, gate_rows = _row_order(experts, out.device)
        down_rows = torch.arange(hidden, device=out.device)
        if experts.layout.shuffled:
            down_rows = _shuffled_places(down_rows)
        for expert in sorted(set(flat.tolist())):
            mine = (flat == expert).nonzero().flatten()
            weight = decode(experts.w13_weight[expert], _read_swizzled(experts.w13_weight_scale[expert], hidden // 16))
            product = x[mine // tokens.top_k] @ weight.T
            gate = None if gate_rows is None else product[:, gate_rows] * experts.w13_alpha[expert]
            hidden_values[mine] = activation(gate, product[:, up_rows] * experts.w13_alpha_up[expert])
            codes, scales = quantize(hidden_values[mine], inverse)
            quantized[mine] = codes * scales.repeat_interleave(16, dim=-1)
            down = decode(experts.w2_weight[expert], _read_swizzled(experts.w2_weight_scale[expert], inter // 16))
            contributions[mine] = (quantized[mine] @ down.T)[:, down_rows] * experts.w2_alpha[expert]
        weighted = contributions.view(-1, tokens.top_k, hidden) * tokens.weights.unsqueeze(-1)
        torch.sum(weighted, dim=1, out=out)
        return MoeTrace(hidden_values, quantized)


def _row_order(experts: PreparedExperts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the prepared rows of the up and the gate channels: in blocks of B rows, TRTLLM-gen's order, or halves."""
    inter, layout = experts.padded_intermediate, experts.layout
    channel = torch.arange(inter, device=device)
    if not layout.gated:
        return _shuffled_places(channel) if layout.shuffled else channel, None
    if layout.shuffled:
        return _shuffled_places(2 * channel), _shuffled_places(2 * channel + 1)
    if not layout.interleaved:
        return channel + inter, channel
    block = layout.gate_up_block
    up = channel // block * (2 * block) + channel % block
    return up, up + block


def _shuffled_places(rows: torch.Tensor) -> torch.Tensor:
    """Return the places of rows in TRTLLM-gen's order: of every 32, row s goes to [0, 8, 16, 24, 1, 9, …][s]."""
    places = torch.tensor([first + 8 * step for first in range(8) for step in range(4)], device=rows.device)
    return rows // 32 * 32 + places[rows % 32]


def _read_swizzled(scales: torch.Tensor, cols: int) -> torch.Tensor:
    """Return ``uint8 [M, Ks]`` in row-major order, each byte from offset(m, k) of the 128x4 swizzle."""
    m = torch.arange(scales.shape[0], device=scales.device).unsqueeze(1)
    k = torch.arange(cols, device=scales.device).unsqueeze(0)
    offset = (m // 128) * (cols // 4) * 512 + (k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4
    return scales.flatten()[offset]
