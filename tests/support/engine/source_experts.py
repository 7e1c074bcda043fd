"""The source checkpoint's experts in vLLM's own engine, computed by nothing that this project has a part in.

vLLM loads the source by its own ModelOpt code and the plugin is off. The experts are computed in float32 from the
tensors as the source has them, by the functions that vLLM has for emulating NVFP4. All the rest is the same engine that
serves the prepared checkpoint. Importing this module puts them into the process's vLLM.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

os.environ |= {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
import ungated_experts  # noqa: F401 (for models whose experts are not gated)
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import nvfp4_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config, ModelOptNvFp4FusedMoE
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)


class SourceExperts(FlashInferCuteDSLExperts):
    """Experts from the source's own tensors."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def workspace_shapes(self, M: int, *_: Any, **__: Any) -> tuple[tuple[int, ...], ...]:
        return (0,), (0,), (M, self.hidden_dim)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> None:
        if expert_map is not None:  # from the model's experts to those of this rank, -1 for others
            topk_ids = expert_map[topk_ids.long()]
        total = torch.zeros(output.shape, dtype=torch.float32)
        for expert in sorted(set(topk_ids.flatten().tolist()) - {-1}):
            token, slot = torch.where(topk_ids == expert)
            both = linear(
                hidden_states[token], w1[expert], self.w1_scale[expert], self.g1_alphas[expert], self.a1_gscale
            )
            if activation == MoEActivation.RELU2_NO_MUL:
                inner = torch.relu(both).square()
            else:
                gate, up = both.chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
            down = linear(inner, w2[expert], self.w2_scale[expert], self.g2_alphas[expert], self.a2_gscale)
            total.index_add_(0, token, down * topk_weights[token, slot, None].float())
        output.copy_(total)


def linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor, inverse_input_scale: torch.Tensor
) -> torch.Tensor:
    """Return NVFP4 activations times NVFP4 weights, in float32."""
    weight = dequantize_to_dtype(codes, scales, scale, torch.float32, 16, swizzle=False)
    return ref_nvfp4_quant_dequant(x.float(), inverse_input_scale, 16) @ weight.T


class ModelOptSourceMethod(ModelOptNvFp4FusedMoE):
    """vLLM's loading, no preparation, and the experts above. The loader looks for "ModelOpt" in the class name."""

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        moe_config.moe_backend = "flashinfer_cutedsl"
        with mock.patch.object(oracle, "backend_to_kernel_cls", lambda backend: [SourceExperts]):
            super().__init__(quant_config, moe_config)

    def process_weights_after_loading(self, layer: Any) -> None:
        scale = layer.w13_weight_scale_2
        self.moe_quant_config = nvfp4_moe_quant_config(
            g1_alphas=scale[:, 0] if scale.ndim == 2 else scale,
            g2_alphas=layer.w2_weight_scale_2,
            a1_gscale=1.0 / layer.w13_input_scale.max(),
            a2_gscale=1.0 / layer.w2_input_scale.max(),
            w1_scale=layer.w13_weight_scale,
            w2_scale=layer.w2_weight_scale,
            is_scale_swizzled=False,
        )
        self.moe_kernel = oracle.make_nvfp4_moe_kernel(
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            experts_cls=SourceExperts,
            backend=self.nvfp4_backend,
            routing_tables=layer._expert_routing_tables(),
        )


ModelOptNvFp4Config.FusedMoEMethodCls = ModelOptSourceMethod
