"""FlashInfer's CuteDSL fused MoE, called with a prepared layer as a server calls it.

FlashInfer is imported when it is asked for. Its API has moved: ``cute_dsl_fused_moe_nvfp4`` since 0.6.4,
``cute_dsl_fused_moe`` beside it since 0.7.0; activations other than plain SwiGLU since 0.6.15, SiTU later. A call
is bound to the signature that is installed, and what that cannot express is an error, never left out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4_prep_kernels.moe_types import ActivationFunction, MoeActivation, MoeTokens, MoeTrace, PreparedExperts

__all__ = [
    "FlashInferMoe",
    "FlashInferUnavailableError",
    "activation_arguments",
    "bind_call",
    "find_entry_point",
    "mma_view",
]

_OLDEST = (0, 6, 4)
"""The first version with the kernel."""
_INSTALL = "pip install 'flashinfer-python>=0.7.2'"
# flashinfer.tllm_enums.ActivationType, the same in all versions that have the parameter
_SWIGLU, _RELU2 = 3, 6


class FlashInferUnavailableError(RuntimeError):
    """FlashInfer is missing, too old, or lacks what a layer needs; the message ends with the command to run."""


def mma_view(scales: torch.Tensor) -> torch.Tensor:
    """Return the kernel's 6-D view of swizzled scales: strides alone, no byte moves.

    Args:
        scales: ``uint8 [E, M, Ks]``, swizzled and contiguous.

    Returns:
        ``[32, 4, M/128, 4, Ks/4, E]``: position (m % 32, m % 128 // 32, m // 128, k % 4, k // 4, expert). Must not
        be made contiguous.
    """
    experts, rows, cols = scales.shape
    tiles = scales.view(experts, rows // 128, cols // 4, 32, 4, 4)
    return tiles.permute(3, 4, 1, 5, 2, 0)


def find_entry_point() -> tuple[str, Callable[..., Any]]:
    """Return ``(version, function)`` of the installed FlashInfer.

    Raises:
        FlashInferUnavailableError: if there is none, or it is older than the kernel.
    """
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError as error:
        raise FlashInferUnavailableError(f"FlashInfer is not installed; run: {_INSTALL}") from error
    if _numbers(version) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise FlashInferUnavailableError(
            f"FlashInfer {version} has no CuteDSL fused MoE, the first one is {oldest}; run: {_INSTALL}"
        )
    try:
        module = importlib.import_module("flashinfer.fused_moe.cute_dsl.fused_moe")
    except ImportError as error:
        raise FlashInferUnavailableError(
            f"FlashInfer {version} cannot import its CuteDSL kernels ({error}); run: {_INSTALL} nvidia-cutlass-dsl"
        ) from error
    function = getattr(module, "cute_dsl_fused_moe", None) or getattr(module, "cute_dsl_fused_moe_nvfp4", None)
    if function is None:
        raise FlashInferUnavailableError(f"FlashInfer {version} has no CuteDSL fused MoE; run: {_INSTALL}")
    return version, function


def bind_call(
    parameters: list[str],
    version: str,
    experts: PreparedExperts,
    tokens: MoeTokens,
    activation: MoeActivation,
    out: torch.Tensor,
) -> dict[str, Any]:
    """Return the keyword arguments of one call, for an entry point with these parameters.

    Raises:
        FlashInferUnavailableError: if this version cannot express the activation.
    """
    count = experts.w13_weight.shape[0]
    call: dict[str, Any] = {
        "x": tokens.codes,
        # linear, not swizzled, with a trailing dimension of 1
        "x_sf": tokens.block_scales.view(torch.float8_e4m3fn).unsqueeze(-1),
        "token_selected_experts": tokens.expert_ids.to(torch.int32),
        "token_final_scales": tokens.weights.to(torch.float32),
        "w1_weight": experts.w13_weight,
        "w1_weight_sf": mma_view(experts.w13_weight_scale).view(torch.float8_e4m3fn),
        "w1_alpha": experts.w13_alpha,
        "fc2_input_scale": experts.fc2_inverse_scale,
        "w2_weight": experts.w2_weight,
        "w2_weight_sf": mma_view(experts.w2_weight_scale).view(torch.float8_e4m3fn),
        "w2_alpha": experts.w2_alpha,
        "num_experts": count,
        "top_k": tokens.top_k,
        "num_local_experts": count,
        "local_expert_offset": 0,
        "output_dtype": out.dtype,
        "moe_output": out,
    }
    call |= activation_arguments(activation)
    missing = sorted(set(call) - set(parameters))
    if missing:
        raise FlashInferUnavailableError(
            f"FlashInfer {version} cannot compute this activation (no parameter {', '.join(missing)}); run: {_INSTALL}"
        )
    return call


def activation_arguments(activation: MoeActivation) -> dict[str, Any]:
    """Return the activation as keyword arguments: only what differs from plain SwiGLU, the default of every version."""
    if activation.function is ActivationFunction.RELU2:
        return {"activation_type": _RELU2}
    wanted: dict[str, Any] = {}
    if activation.function is ActivationFunction.SITU:
        wanted = {"activation_type": _SWIGLU, "situ_beta": activation.situ_beta}
        if activation.situ_linear_beta is not None:
            wanted["situ_linear_beta"] = activation.situ_linear_beta
        return wanted
    if activation.alpha != 1.0:
        wanted["swiglu_alpha"] = activation.alpha
    if activation.beta != 0.0:
        wanted["swiglu_beta"] = activation.beta
    if activation.limit != math.inf:
        wanted["swiglu_limit"] = activation.limit
    return wanted


@dataclass(frozen=True)
class FlashInferMoe:
    """The ``flashinfer`` backend: the kernel that a server runs, on compute capability 10.x; bfloat16 output."""

    name: str = "flashinfer"
    out_dtype: torch.dtype = torch.bfloat16

    @staticmethod
    def check() -> str:
        """Return the version, or raise :class:`FlashInferUnavailableError` before any work if it cannot be used."""
        return find_entry_point()[0]

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        """See :class:`~nvfp4_prep_kernels.moe_types.MoeBackend`; the intermediate stays inside the kernel."""
        if (name := experts.layout.name) != "cutedsl":
            raise FlashInferUnavailableError(f"the layout {name} is for another kernel; use the triton backend")
        if experts.w13_weight_scale_2_up is not None:
            raise FlashInferUnavailableError("the CuteDSL kernel takes one global scale for gate and up, not two")
        version, function = find_entry_point()
        parameters = list(inspect.signature(function).parameters)
        function(**bind_call(parameters, version, experts, tokens, activation, out))
        torch.cuda.synchronize(out.device)
        return None


def _numbers(version: str) -> tuple[int, ...]:
    found = []
    for part in version.split(".")[:3]:
        digits = "".join(character for character in part if character.isdigit())
        found.append(int(digits or 0))
    return tuple(found)
