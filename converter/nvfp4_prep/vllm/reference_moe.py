"""The opt-in for tests and trials: prepared experts computed by this project's code in place of FlashInfer's launch.

With ``NVFP4_PREP_REFERENCE_MOE=1`` a prepared checkpoint is served where FlashInfer's kernel does not run: in torch on
a CPU, in Triton on a GPU from Ampere to Hopper. Everything else is vLLM's own: engine, scheduler, attention, router,
sampler. It is slow (the torch code decodes an expert for each call) and not for production; the log says so.

For that, vLLM's choice of the experts class is replaced while a prepared layer's method is created, and only then.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, cast
from unittest import mock

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, nvfp4_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle

from nvfp4_prep.errors import ServingError
from nvfp4_prep.layouts import LAYOUTS, LayoutName
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.moe_types import (
    ActivationFunction,
    MoeActivation,
    MoeBackend,
    MoeTokens,
    PreparedExperts,
    ServedExperts,
)
from nvfp4_prep_kernels.nvfp4 import encode_codes, quantize
from nvfp4_prep_kernels.torch_moe import TorchMoe

__all__ = [
    "REFERENCE_VARIABLE",
    "ReferenceExperts",
    "check_backend",
    "reference_moe_asked_for",
    "reference_quant_config",
    "selecting",
]

logger = init_logger(f"vllm.{__name__}")

REFERENCE_VARIABLE = "NVFP4_PREP_REFERENCE_MOE"
"""Environment variable: 1 computes prepared experts in torch or Triton instead of FlashInfer's kernel."""
_REPLACED = LAYOUTS[LayoutName.CUTEDSL].flag


def reference_moe_asked_for() -> bool:
    """Return whether the user opted in."""
    return os.environ.get(REFERENCE_VARIABLE) == "1"


def check_backend(backend: str, layer_name: str) -> None:
    """Raise :class:`ServingError` if the user opted in and the chosen backend is not the one that is replaced."""
    if not reference_moe_asked_for() or backend == _REPLACED:
        return
    raise ServingError(
        f"{REFERENCE_VARIABLE}=1 computes experts in the CuteDSL kernel's layout only",
        where=layer_name,
        expected=f"--moe-backend {_REPLACED}",
        actual=f"--moe-backend {backend}",
        next_step=f"Give --moe-backend {_REPLACED}: weights prepared for another kernel are rearranged at the start.",
    )


@contextlib.contextmanager
def selecting() -> Iterator[None]:
    """Have vLLM choose :class:`ReferenceExperts` for the CuteDSL backend, if the user opted in; its checks all run."""
    if not reference_moe_asked_for():
        yield
        return
    logger.warning_once(
        "%s=1: prepared experts are computed by nvfp4-prep's reference code, not by FlashInfer's kernel. This is for"
        " tests and trials, very slow, and not for production.",
        REFERENCE_VARIABLE,
    )
    original = oracle.backend_to_kernel_cls

    def backend_to_kernel_cls(backend: oracle.NvFp4MoeBackend) -> list[type]:
        if backend == oracle.NvFp4MoeBackend.FLASHINFER_CUTEDSL:
            return [ReferenceExperts]
        return list(original(backend))

    with mock.patch.object(oracle, "backend_to_kernel_cls", backend_to_kernel_cls):
        yield


def reference_quant_config(layer: Any) -> FusedMoEQuantConfig:
    """Return what vLLM makes for the CuteDSL kernel, with the block scales as stored instead of FlashInfer's view."""
    return nvfp4_moe_quant_config(
        g1_alphas=layer.w13_weight_scale_2,
        g2_alphas=layer.w2_weight_scale_2,
        a1_gscale=1.0 / layer.w13_input_scale,
        a2_gscale=1.0 / layer.w2_input_scale,
        w1_scale=layer.w13_weight_scale,
        w2_scale=layer.w2_weight_scale,
        is_scale_swizzled=False,
        gemm1_alpha=getattr(layer, "swiglu_alpha", None),
        gemm1_beta=getattr(layer, "swiglu_beta", None),
        gemm1_clamp_limit=getattr(layer, "swiglu_limit", None),
    )


class ReferenceExperts(FlashInferCuteDSLExperts):  # type: ignore[misc]
    """vLLM's CuteDSL experts with another launch."""

    layout: MoeLayout

    @staticmethod
    def _supports_current_device() -> bool:
        """Any device with torch."""
        return True

    @property
    def expects_unquantized_inputs(self) -> bool:
        """The activations are quantized here: vLLM's op for it is a compiled one."""
        return True

    def workspace_shapes(self, M: int, *_: Any, **__: Any) -> tuple[tuple[int, ...], ...]:
        """Return no workspace, and the shape of the output."""
        return (0,), (0,), (M, self.hidden_dim)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Process as vLLM does, and remember the layout of the loaded bytes."""
        super().process_weights_after_loading(layer)
        method: Any = layer.quant_method
        layout = method.stamp.moe_layout(gated=method.moe.is_act_and_mul)
        self.layout = layout.for_moe_tp(1) if method.relayout is None else method.relayout.target

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
        """Compute the experts of this rank for all tokens."""
        if not hidden_states.shape[0]:
            return
        cuda = output.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            raise ServingError(
                f"{REFERENCE_VARIABLE}=1 cannot be captured in a CUDA graph", next_step="Serve with --enforce-eager."
            )
        experts = ServedExperts(
            layout=self.layout,
            w13_weight=w1,
            w13_weight_scale=self.w1_scale.view(torch.uint8),
            w2_weight=w2,
            w2_weight_scale=self.w2_scale.view(torch.uint8),
            w13_alpha=self.g1_alphas,
            w2_alpha=self.g2_alphas,
            fc2_inverse_scale=self.a2_gscale[:1],
        )
        tokens = self._tokens(hidden_states, topk_weights, topk_ids)
        result = torch.empty(output.shape, dtype=torch.float32, device=output.device)
        _backend(cuda)(cast(PreparedExperts, experts), tokens, self._activation(activation), result)
        output.copy_(result)

    def _tokens(self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> MoeTokens:
        """Quantize the tokens; experts of other ranks get weight 0."""
        codes, scales = quantize(hidden_states.float(), float(self.a1_gscale.flatten()[0]))
        local = ids.to(torch.int32) - self.local_expert_offset
        mine = (local >= 0) & (local < self.local_num_experts)
        return MoeTokens(
            codes=encode_codes(codes),
            block_scales=scales.to(torch.float8_e4m3fn).view(torch.uint8),
            expert_ids=torch.where(mine, local, torch.zeros_like(local)),
            weights=torch.where(mine, weights.float(), torch.zeros_like(weights, dtype=torch.float32)),
        )

    def _activation(self, activation: MoEActivation) -> MoeActivation:
        limit = math.inf if self.gemm1_clamp_limit is None else float(self.gemm1_clamp_limit)
        if activation == MoEActivation.RELU2_NO_MUL:
            return MoeActivation.relu2()
        if activation == MoEActivation.SILU:
            return MoeActivation(limit=limit)
        if activation == MoEActivation.SITU:
            return MoeActivation(
                ActivationFunction.SITU, situ_beta=self.situ_beta, situ_linear_beta=self.situ_linear_beta
            )
        alpha = 1.0 if self.gemm1_alpha is None else float(self.gemm1_alpha)
        beta = 0.0 if self.gemm1_beta is None else float(self.gemm1_beta)
        return MoeActivation(alpha=alpha, beta=beta, limit=limit)


def _backend(cuda: bool) -> MoeBackend:
    if not cuda:
        return TorchMoe()
    from nvfp4_prep_kernels.triton_moe import TritonMoe

    return TritonMoe()
