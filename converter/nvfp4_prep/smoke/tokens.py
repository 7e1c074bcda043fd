"""Random tokens and routings that leave no way to look right by accident."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nvfp4_prep_kernels import BLOCK_COLS
from nvfp4_prep_kernels.moe_types import MoeTokens
from nvfp4_prep_kernels.nvfp4 import E2M1_MAX, E4M3_MAX, encode_codes, quantize

__all__ = ["Routing", "pack_tokens", "random_tokens", "routings"]

_PADDING_CODE = 0x22
"""Two codes of value 1: the padded columns of the tokens are not zero, so padding of the weights must be."""
_PADDING_SCALE = 0x40
"""e4m3 of 2."""


@dataclass(frozen=True)
class Routing:
    """Routing of one case's tokens to experts.

    Attributes:
        name: what is special about it.
        first_token: row of its first token among all tokens.
        expert_ids: ``int64 [T, k]``, positions of experts.
        weights: ``float32 [T, k]``.
    """

    name: str
    first_token: int
    expert_ids: torch.Tensor
    weights: torch.Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.expert_ids)


def random_tokens(count: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """Return the tokens with a largest value of 1: ``float32 [count, hidden]`` on the generator's device.

    Gaussian with 5 sigma = 1, and in each token one value of exactly 1 in a random column: it meets the top of the
    calibrated range, where a wrong input scale saturates.
    """
    device = generator.device
    tokens = (torch.randn(count, hidden, device=device, generator=generator) * 0.2).clamp(-1.0, 1.0)
    column = torch.randint(0, hidden, (count, 1), device=device, generator=generator)
    return tokens.scatter(1, column, 1.0)


def pack_tokens(
    values: torch.Tensor, input_scale: float, padded_hidden: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize tokens as a server does: with 1 / input_scale and e4m3 block scales.

    Args:
        values: ``float32 [T, H]`` with a largest value of 1, in units of the calibrated maximum.
        input_scale: the layer's. With 0, which a damaged file may hold, 1 / input_scale is infinite, as in float32.
        padded_hidden: Hp.

    Returns:
        ``(codes uint8 [T, Hp/2], block scales uint8 [T, Hp/16], code * block scale float32 [T, H])``; the padded
        columns are not zero.
    """
    count, hidden = values.shape
    # bfloat16, as a model's activations are
    rows = (values * (input_scale * E2M1_MAX * E4M3_MAX)).to(torch.bfloat16).to(torch.float32)
    codes, scales = quantize(rows, 1.0 / input_scale if input_scale else math.inf)
    packed = torch.full((count, padded_hidden // 2), _PADDING_CODE, dtype=torch.uint8, device=values.device)
    packed[:, : hidden // 2] = encode_codes(codes)
    blocks = torch.full((count, padded_hidden // 16), _PADDING_SCALE, dtype=torch.uint8, device=values.device)
    blocks[:, : hidden // 16] = scales.to(torch.float8_e4m3fn).view(torch.uint8)
    return packed, blocks, codes * scales.repeat_interleave(BLOCK_COLS, dim=-1)


def routings(experts: int, top_k: int, per_expert: int, routed: int, generator: torch.Generator) -> tuple[Routing, ...]:
    """Return the three cases: every expert alone, one expert without tokens, one expert with all tokens.

    Args:
        experts: E.
        top_k: the model's; reduced where E does not allow it.
        per_expert: tokens for each expert alone.
        routed: tokens of each of the other cases.
        generator: random numbers on its device.
    """
    device = generator.device
    alone = torch.arange(experts, device=device).repeat_interleave(per_expert).unsqueeze(1)
    weights = torch.rand(len(alone), 1, device=device, generator=generator) + 0.5
    cases = [Routing("every expert alone", 0, alone, weights)]
    if experts == 1:
        return tuple(cases)
    start = len(alone)
    for name, special, score in (("first expert without tokens", 0, -1.0), ("last expert has all tokens", -1, 2.0)):
        scores = torch.rand(routed, experts, device=device, generator=generator)
        scores[:, special] = score
        best = scores.topk(min(top_k, experts - 1), dim=1)
        logits = torch.randn(best.indices.shape, device=device, generator=generator)
        cases.append(Routing(name, start, best.indices, logits.softmax(dim=1)))
        start += routed
    return tuple(cases)


def routed_tokens(packed: torch.Tensor, blocks: torch.Tensor, case: Routing) -> MoeTokens:
    """Return the tokens of one case as a backend takes them."""
    rows = slice(case.first_token, case.first_token + case.tokens)
    return MoeTokens(
        packed[rows].contiguous(), blocks[rows].contiguous(), case.expert_ids.to(torch.int32), case.weights
    )
