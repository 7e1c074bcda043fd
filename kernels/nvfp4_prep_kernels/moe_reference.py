"""The fused MoE from SOURCE tensors, with the arithmetic of the CuteDSL kernel, and bounds on what may differ.

One expert, tokens already quantized to ``x = code * block scale`` (global scale left out):

    g, u = (x @ gate.T) * gate_alpha, (x @ up.T) * up_alpha      alpha = weight_scale_2 * input_scale
    h    = activation(g, u)
    hq   = NVFP4(h) with 1 / fc2 input scale                     block scale e4m3(max|h| / 6 / input_scale), codes e2m1
    y    = (hq @ down.T) * weight_scale_2 * input_scale

Two correct implementations differ in the order of float32 additions and in approximate exp and 1/x. That hardly
matters except where a value of ``h`` lies so close to the middle between two codes (or a maximum so close to the
middle between two block scales) that the difference decides the rounding. :func:`evaluate` finds these places, and
bounds each element of the output:

    tolerance = ( sum over j of D[t, j] * |down[n, j]| + ACCUMULATION * |hq[t]| * |down[n]| ) * alpha

with ``D`` the largest change of ``hq[t, j]`` that an error of ``ACCUMULATION * |x[t]| * |w[j]|`` in a dot product
and a relative error ``FUNCTION`` in the activation can cause. Where no rounding is in doubt the bound is tight:
about 1e-6 of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_prep_kernels.layout import BLOCK_COLS
from nvfp4_prep_kernels.moe_types import ActivationFunction, MoeActivation
from nvfp4_prep_kernels.nvfp4 import E2M1_MAX, decode, quantize_codes, round_e4m3

__all__ = ["Evaluation", "SourceExpert", "SourceMatrix", "evaluate", "evaluate_down"]

ACCUMULATION = 2.0**-20
"""Error of a float32 dot product over |a| * |b|. Random rounding gives 2^-25; tensor cores truncate, which adds up."""
FUNCTION = 2.0**-19
"""Relative error of exp2, 1/x and a few float32 products: each approximation is good to 2^-22."""
OUTPUT = 2.0**-21
"""Relative error of the last products and of the sum over a token's experts."""
# The largest slope of g * sigmoid(alpha * g) for any alpha, and of SiTU, rounded up.
_SLOPE = 1.1


@dataclass(frozen=True)
class SourceMatrix:
    """One projection of one expert as the source has it.

    Attributes:
        codes: ``uint8 [rows, cols/2]``.
        block_scales: ``uint8 [rows, cols/16]``, row-major.
        global_scale: weight_scale_2, a multiplier.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    global_scale: float

    def decode(self) -> torch.Tensor:
        """Return ``float32 [rows, cols]`` without the global scale."""
        return decode(self.codes, self.block_scales)


@dataclass(frozen=True)
class SourceExpert:
    """One expert as the source has it; ``gate`` is ``None`` for non-gated experts."""

    gate: SourceMatrix | None
    up: SourceMatrix
    down: SourceMatrix


@dataclass(frozen=True)
class Evaluation:
    """One expert's outputs, all float32.

    Attributes:
        out: ``[T, H]``.
        tolerance: ``[T, H]``, what a correct float32 implementation may differ by.
        hidden, hidden_tolerance: ``[T, I]``, the activation's output and what it may differ by.
        quantized, spread: ``[T, I]``, code * block scale of it, and what rounding may change there.
    """

    out: torch.Tensor
    tolerance: torch.Tensor
    hidden: torch.Tensor
    hidden_tolerance: torch.Tensor
    quantized: torch.Tensor
    spread: torch.Tensor

    @property
    def doubtful(self) -> int:
        """Places of the intermediate whose rounding is in doubt."""
        return int((self.spread > 0).sum())


def evaluate(
    expert: SourceExpert,
    x: torch.Tensor,
    activation: MoeActivation,
    input_scale: float,
    fc2_input_scale: float,
    *,
    order: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Evaluation:
    """Run one expert.

    Args:
        expert: source tensors on the device of ``x``.
        x: ``float32 [T, H]``: code * block scale of the quantized tokens.
        activation: function and parameters.
        input_scale, fc2_input_scale: the layer's largest input scales.
        order: permutations of the H and the I columns: the same sums in another order, to measure what that does.
    """
    columns = None if order is None else order[0]
    up, up_error = _project(expert.up, x, input_scale, columns)
    gate, gate_error = (None, None) if expert.gate is None else _project(expert.gate, x, input_scale, columns)
    hidden = activation(gate, up)
    error = _activation_error(activation, gate, up, gate_error, up_error) + FUNCTION * hidden.abs()
    inverse = 1.0 / fc2_input_scale
    quantized, spread = _quantize_with_spread(hidden, error, inverse)
    down = expert.down.decode()
    alpha = expert.down.global_scale * fc2_input_scale
    out = _product(quantized, down, None if order is None else order[1]) * alpha
    bound = spread @ down.abs().T * abs(alpha) + _down_bound(quantized, down, alpha)
    return Evaluation(out, bound + OUTPUT * out.abs(), hidden, error, quantized, spread)


def evaluate_down(
    expert: SourceExpert, quantized: torch.Tensor, fc2_input_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second GEMM alone, from an intermediate that an implementation has shown.

    Args:
        expert: source tensors.
        quantized: ``float32 [T, I]``, code * block scale.
        fc2_input_scale: the layer's.

    Returns:
        ``(out, tolerance)``, ``[T, H]``: with the intermediate given, no rounding is in doubt.
    """
    down = expert.down.decode()
    alpha = expert.down.global_scale * fc2_input_scale
    out = quantized @ down.T * alpha
    return out, _down_bound(quantized, down, alpha) + OUTPUT * out.abs()


def _down_bound(quantized: torch.Tensor, down: torch.Tensor, alpha: float) -> torch.Tensor:
    return ACCUMULATION * abs(alpha) * _norm(quantized) * _norm(down).T


def _project(
    matrix: SourceMatrix, x: torch.Tensor, input_scale: float, columns: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of one projection and the bound of its error."""
    weight = matrix.decode()
    alpha = matrix.global_scale * input_scale
    return _product(x, weight, columns) * alpha, ACCUMULATION * abs(alpha) * _norm(x) * _norm(weight).T


def _product(left: torch.Tensor, right: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    return left @ right.T if columns is None else left[:, columns] @ right[:, columns].T


def _norm(rows: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norm


def _activation_error(
    activation: MoeActivation,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    gate_error: torch.Tensor | None,
    up_error: torch.Tensor,
) -> torch.Tensor:
    """Bound how much the activation changes when its arguments change by their errors."""
    if gate is None or gate_error is None:
        return (2 * up.clamp(min=0.0) + up_error) * up_error
    if activation.function is ActivationFunction.SITU:
        # tanh comes from a sigmoid: near zero its error is absolute
        bound = FUNCTION * (activation.situ_beta or 1.0)
        up_error = up_error + FUNCTION * (activation.situ_linear_beta or 0.0)
        return gate.abs() * up_error + (_SLOPE * gate_error + bound) * (up.abs() + up_error)
    limited = gate.clamp(max=activation.limit)
    factor = limited * torch.sigmoid(activation.alpha * limited)
    other = (up.clamp(-activation.limit, activation.limit) + activation.beta).abs()
    return factor.abs() * up_error + _SLOPE * gate_error * (other + up_error)


def _quantize_with_spread(
    hidden: torch.Tensor, error: torch.Tensor, inverse: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``code * block scale`` of the intermediate, and its largest change under errors of ``hidden``."""
    blocks, errors = (tensor.reshape(len(tensor), -1, BLOCK_COLS) for tensor in (hidden, error))
    magnitude = blocks.abs()
    factor = inverse / E2M1_MAX
    middle = round_e4m3(magnitude.amax(-1) * factor)
    low = round_e4m3((magnitude - errors).clamp(min=0).amax(-1) * factor * (1 - FUNCTION))
    high = round_e4m3((magnitude + errors).amax(-1) * factor * (1 + FUNCTION))
    value = quantize_codes(blocks, middle, inverse) * middle.unsqueeze(-1)
    spread = torch.zeros_like(value)
    for scales in (middle,) if torch.equal(low, high) else (middle, low, high):
        for shift in (-1.0, 0.0, 1.0):
            other = quantize_codes(blocks + shift * errors, scales, inverse) * scales.unsqueeze(-1)
            spread = torch.maximum(spread, (other - value).abs())
    return value.flatten(-2), spread.flatten(-2)
