"""The source checkpoint in vLLM's own engine, with experts that this project has no part in.

Run as a program: ``source_engine.py SOURCE REQUEST.json ANSWER.json``. vLLM loads the source by its own ModelOpt code
and the plugin is off. The experts are computed in float32 from the tensors as the source has them, by the functions
that vLLM has for emulating NVFP4. All the rest is the same engine that serves the prepared checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import nvfp4_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config, ModelOptNvFp4FusedMoE
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)

from vllm import LLM, SamplingParams


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
        *_: Any,
        **__: Any,
    ) -> None:
        total = torch.zeros(output.shape, dtype=torch.float32)
        for expert in sorted(set(topk_ids.flatten().tolist())):
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


def main(source: str, request: Path, answer: Path) -> None:
    """Write tokens and log-probabilities of the request's prompts, greedily decoded."""
    wanted = json.loads(request.read_text())
    with mock.patch.object(ModelOptNvFp4Config, "FusedMoEMethodCls", ModelOptSourceMethod):
        engine = LLM(source, enforce_eager=True, max_model_len=128, dtype="bfloat16", max_num_seqs=1)
    sampling = SamplingParams(temperature=0, max_tokens=wanted["max_tokens"], logprobs=1, ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in wanted["prompts"]]
    found = [one.outputs[0] for one in engine.generate(prompts, sampling)]
    answer.write_text(
        json.dumps(
            [
                {
                    "tokens": list(each.token_ids),
                    "logprobs": [at[token].logprob for token, at in zip(each.token_ids, each.logprobs, strict=True)],
                }
                for each in found
            ]
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
