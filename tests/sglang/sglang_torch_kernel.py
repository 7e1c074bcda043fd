"""SGLang's CuteDSL kernel and its quantization of activations in torch, in the places where SGLang calls FlashInfer.

What reaches them is SGLang's: router, weights, block scales as its MMA view, alphas and input scales that it resolved.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.moe_types import MoeActivation, MoeTokens, PreparedExperts, ServedExperts
from nvfp4_prep_kernels.nvfp4 import encode_codes, quantize
from nvfp4_prep_kernels.torch_moe import TorchMoe

__all__ = ["replace_kernel"]


def replace_kernel() -> None:
    """Put both in the place of FlashInfer's."""
    import flashinfer
    from sglang.srt.layers.quantization import fp4_utils

    flashinfer.CuteDslMoEWrapper = TorchWrapper
    fp4_utils.fp4_quantize = quantize_tokens


def quantize_tokens(
    tokens: torch.Tensor, inverse_scale: torch.Tensor, **_options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and row-major block scales, as FlashInfer's fp4_quantize with is_sf_swizzled_layout=False."""
    codes, scales = quantize(tokens.float(), float(inverse_scale.reshape(-1)[0]))
    return encode_codes(codes), scales.to(torch.float8_e4m3fn).view(torch.uint8)


class TorchWrapper:
    """FlashInfer's CuteDslMoEWrapper for gated experts of one rank."""

    def __init__(self, *, output_dtype: torch.dtype, num_experts: int, num_local_experts: int, **_options: Any) -> None:
        assert num_experts == num_local_experts
        self.output_dtype = output_dtype
        self.quant_mode = "w4a4"

    def run(
        self,
        *,
        x: torch.Tensor,
        x_sf: torch.Tensor,
        token_selected_experts: torch.Tensor,
        token_final_scales: torch.Tensor,
        w1_weight: torch.Tensor,
        w1_weight_sf: torch.Tensor,
        w1_alpha: torch.Tensor,
        fc2_input_scale: torch.Tensor,
        w2_weight: torch.Tensor,
        w2_weight_sf: torch.Tensor,
        w2_alpha: torch.Tensor,
        per_token_scale: None = None,
    ) -> torch.Tensor:
        """One layer for all tokens, ``[T, H]``."""
        assert per_token_scale is None
        experts = ServedExperts(
            MoeLayout.cutedsl(gated=True),
            w1_weight,
            _stored(w1_weight_sf),
            w2_weight,
            _stored(w2_weight_sf),
            w1_alpha,
            w2_alpha,
            fc2_input_scale.reshape(-1),
        )
        tokens = MoeTokens(x, x_sf.view(torch.uint8), token_selected_experts, token_final_scales.float())
        out = torch.empty(len(x), experts.padded_hidden)
        TorchMoe()(cast(PreparedExperts, experts), tokens, MoeActivation(), out)
        return out.to(self.output_dtype)


def _stored(view: torch.Tensor) -> torch.Tensor:
    """Swizzled scales as stored, ``uint8 [E, rows, columns]``, from the kernel's view of them."""
    _, _, row_tiles, _, column_tiles, experts = view.shape
    tiles = view.view(torch.uint8).permute(5, 2, 4, 0, 1, 3)
    return tiles.reshape(experts, row_tiles * 128, column_tiles * 4)
