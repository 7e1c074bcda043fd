"""Types of the fused-MoE implementations: a prepared layer, activations and routed, quantized tokens."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from nvfp4_prep_kernels.layout import MoeDims, MoeLayout

__all__ = [
    "ActivationFunction",
    "MoeActivation",
    "MoeBackend",
    "MoeTokens",
    "MoeTrace",
    "PreparedExperts",
    "ServedExperts",
]


class ActivationFunction(enum.StrEnum):
    """The functions between the two GEMMs that the CuteDSL kernel has."""

    SWIGLU = "swiglu"
    SITU = "situ"
    RELU2 = "relu2"


@dataclass(frozen=True)
class MoeActivation:
    """Activation with parameters, named as FlashInfer names them.

    With g and u the gate and up projections' outputs and bound(x, b) = b * tanh(x / b):

        swiglu  g' * sigmoid(alpha * g') * (u' + beta),  g' = min(g, limit), u' = clamp(u, -limit, limit)
        situ    bound(g, situ_beta) * sigmoid(g) * u',   u' = bound(u, situ_linear_beta), u where that is None
        relu2   max(u, 0)^2,                             no gate
    """

    function: ActivationFunction = ActivationFunction.SWIGLU
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    situ_beta: float | None = None
    situ_linear_beta: float | None = None

    def __post_init__(self) -> None:
        situ = self.function is ActivationFunction.SITU
        if situ != (self.situ_beta is not None) or (self.situ_linear_beta is not None and not situ):
            raise ValueError("situ_beta and situ_linear_beta belong to SiTU, and SiTU needs situ_beta")
        if any(beta is not None and not 0 < beta < math.inf for beta in (self.situ_beta, self.situ_linear_beta)):
            raise ValueError("situ_beta and situ_linear_beta must be positive and finite")

    @classmethod
    def swigluoai(cls, limit: float = 7.0) -> MoeActivation:
        """Return gpt-oss's SwiGLU."""
        return cls(alpha=1.702, beta=1.0, limit=limit)

    @classmethod
    def relu2(cls) -> MoeActivation:
        """Return Nemotron's squared ReLU."""
        return cls(ActivationFunction.RELU2)

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.function is not ActivationFunction.RELU2

    def __call__(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """Apply the activation to float32 tensors of one shape; ``gate`` is ``None`` for relu2."""
        if gate is None:
            return up.clamp(min=0.0).square()
        if self.function is ActivationFunction.SITU:
            bound = self.situ_beta or 1.0
            linear = self.situ_linear_beta
            bounded = up if linear is None else linear * torch.tanh(up / linear)
            return bound * torch.tanh(gate / bound) * torch.sigmoid(gate) * bounded
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up.clamp(-self.limit, self.limit) + self.beta)


@dataclass(frozen=True)
class PreparedExperts:
    """One prepared layer (or some of its experts) in memory, all on one device.

    Attributes:
        layout: in which the four big tensors are.
        dims: sizes without padding; ``dims.experts`` is E, the experts in memory.
        w13_weight, w2_weight: codes, ``uint8 [E, rows, bytes per row]`` as ``layout`` says.
        w13_weight_scale, w2_weight_scale: swizzled block scales, ``uint8`` likewise.
        w13_weight_scale_2, w2_weight_scale_2: global scales, ``float32 [E]``.
        w13_input_scale, w2_input_scale: ``float32 [E]``.
        w13_weight_scale_2_up: up's global scale, ``float32 [E]``, where it may differ from gate's; TRTLLM-gen's
            kernels take both, CuteDSL's one.
    """

    layout: MoeLayout
    dims: MoeDims
    w13_weight: torch.Tensor
    w13_weight_scale: torch.Tensor
    w2_weight: torch.Tensor
    w2_weight_scale: torch.Tensor
    w13_weight_scale_2: torch.Tensor
    w2_weight_scale_2: torch.Tensor
    w13_input_scale: torch.Tensor
    w2_input_scale: torch.Tensor
    w13_weight_scale_2_up: torch.Tensor | None = None

    @property
    def padded_hidden(self) -> int:
        """Hp."""
        return self.layout.padded_hidden(self.dims.hidden)

    @property
    def padded_intermediate(self) -> int:
        """Ip."""
        return self.layout.padded_intermediate(self.dims.intermediate)

    @property
    def w13_alpha(self) -> torch.Tensor:
        """``float32 [E]``: what the first GEMM's sums are multiplied by, as a server computes it once."""
        return self.w13_weight_scale_2 * self.w13_input_scale

    @property
    def w13_alpha_up(self) -> torch.Tensor:
        """``float32 [E]``: the same for the sums of up; equal to :attr:`w13_alpha` unless up has its own scale."""
        if self.w13_weight_scale_2_up is None:
            return self.w13_alpha
        return self.w13_weight_scale_2_up * self.w13_input_scale

    @property
    def w2_alpha(self) -> torch.Tensor:
        """``float32 [E]``: the same for the second GEMM."""
        return self.w2_weight_scale_2 * self.w2_input_scale

    @property
    def fc2_inverse_scale(self) -> torch.Tensor:
        """``float32 [1]``: what the kernel quantizes the intermediate with; it reads element 0 alone."""
        return 1.0 / self.w2_input_scale[:1]


@dataclass(frozen=True)
class ServedExperts:
    """The part of :class:`PreparedExperts` that an implementation reads, as a server holds it.

    Attributes:
        layout, w13_weight, w13_weight_scale, w2_weight, w2_weight_scale: as there, of one rank.
        w13_alpha, w2_alpha: ``float32 [E]``, as the server multiplied them.
        fc2_inverse_scale: ``float32``; element 0 is read.
    """

    layout: MoeLayout
    w13_weight: torch.Tensor
    w13_weight_scale: torch.Tensor
    w2_weight: torch.Tensor
    w2_weight_scale: torch.Tensor
    w13_alpha: torch.Tensor
    w2_alpha: torch.Tensor
    fc2_inverse_scale: torch.Tensor

    @property
    def w13_alpha_up(self) -> torch.Tensor:
        """Gate's factor: a layer whose up has another one is refused for the CuteDSL layout."""
        return self.w13_alpha

    @property
    def padded_hidden(self) -> int:
        """Hp."""
        return self.w2_weight.shape[1]

    @property
    def padded_intermediate(self) -> int:
        """Ip of this rank."""
        return self.w2_weight.shape[2] * 2


@dataclass(frozen=True)
class MoeTokens:
    """Quantized, routed tokens.

    Attributes:
        codes: ``uint8 [T, Hp/2]``.
        block_scales: ``uint8 [T, Hp/16]``, e4m3 bytes, row-major (the kernel's ``x_sf`` is not swizzled).
        expert_ids: ``int32 [T, k]``, all different in a row.
        weights: ``float32 [T, k]``.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor

    @property
    def top_k(self) -> int:
        """Experts of each token."""
        return self.expert_ids.shape[1]


@dataclass(frozen=True)
class MoeTrace:
    """Values between the two GEMMs, where an implementation can show them; ``[T * k, Ip]``, pair ``t * k + slot``.

    Attributes:
        hidden: ``float32``, the activation's output.
        quantized: code * block scale of it, which the second GEMM reads.
    """

    hidden: torch.Tensor
    quantized: torch.Tensor


class MoeBackend(Protocol):
    """One implementation of the fused MoE over the prepared layout."""

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    @property
    def out_dtype(self) -> torch.dtype:
        """What it writes: float32, or bfloat16 for the real kernel."""
        ...

    def __call__(
        self, experts: PreparedExperts, tokens: MoeTokens, activation: MoeActivation, out: torch.Tensor
    ) -> MoeTrace | None:
        """Write ``out [T, Hp]``; return the intermediate where the implementation can show it."""
        ...
