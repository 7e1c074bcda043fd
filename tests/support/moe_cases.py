"""Random MoE layers, source and prepared, for the tests of the fused MoE."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, Projection
from nvfp4_prep_kernels.moe_reference import SourceExpert, SourceMatrix
from nvfp4_prep_kernels.moe_types import ActivationFunction, MoeActivation, PreparedExperts

SITU = MoeActivation(ActivationFunction.SITU, situ_beta=4.0, situ_linear_beta=3.0)
CASES = {
    "kimi-like": (MoeLayout.cutedsl(gated=True), MoeDims(6, 128, 256), MoeActivation()),
    "padded, 16-row blocks, oai": (
        MoeLayout.cutedsl(gated=True, gate_up_block=16),
        MoeDims(3, 80, 272),
        MoeActivation.swigluoai(),
    ),
    "padded for two ranks, clamped": (
        MoeLayout.cutedsl(gated=True, gate_up_block=32, moe_tp=2),
        MoeDims(3, 160, 272),
        MoeActivation(limit=0.5),
    ),
    "batched": (MoeLayout.cutedsl_batched(), MoeDims(3, 64, 256), MoeActivation()),
    "trtllm": (MoeLayout.trtllm(gated=True), MoeDims(6, 128, 256), MoeActivation()),
    "trtllm, padded for two ranks, oai": (
        MoeLayout.trtllm(gated=True, moe_tp=2),
        MoeDims(3, 160, 272),
        MoeActivation.swigluoai(),
    ),
    "trtllm, relu2": (MoeLayout.trtllm(gated=False), MoeDims(3, 80, 272), MoeActivation.relu2()),
    "relu2": (MoeLayout.cutedsl(gated=False), MoeDims(3, 80, 272), MoeActivation.relu2()),
    "situ": (MoeLayout.cutedsl(gated=True), MoeDims(3, 64, 512), SITU),
}
"""Name to layout, dimensions and activation: each kind of layout, padded and not, each activation."""


@dataclass(frozen=True)
class Layer:
    """One layer twice."""

    source: tuple[SourceExpert, ...]
    prepared: PreparedExperts
    activation: MoeActivation
    input_scale: float
    fc2_input_scale: float


def random_bytes(shape: tuple[int, ...], generator: torch.Generator, *, scale: bool) -> torch.Tensor:
    """Random codes, or random block scales between 8 and 48."""
    if not scale:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    values = torch.rand(shape, generator=generator) * 40 + 8
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def random_layer(
    layout: MoeLayout,
    dims: MoeDims,
    activation: MoeActivation,
    device: torch.device,
    seed: int = 0,
    *,
    two_w13_scales: bool = False,
) -> Layer:
    """A layer whose tensors are random and whose scalars differ from expert to expert; up's from gate's if wanted."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[tuple[Projection, bool], torch.Tensor] = {}
    prepared = {}
    for tensor in PreparedTensor:
        shape = (dims.experts, *layout.source_shape(tensor, dims))
        mine = [random_bytes(shape, generator, scale=tensor.is_scale).to(device) for _ in layout.projections(tensor)]
        parts |= {(name, tensor.is_scale): part for name, part in zip(layout.projections(tensor), mine, strict=True)}
        prepared[tensor.value] = layout.apply(tensor, *mine).contiguous()
    w13, w2 = torch.rand(2, dims.experts, generator=generator) * 1e-4 + 1e-4
    w13_up = torch.rand(dims.experts, generator=generator) * 1e-4 + 1e-4 if two_w13_scales else w13
    input_scale, fc2_input_scale = 0.003, 0.002

    def matrix(name: Projection, expert: int, scale_2: torch.Tensor) -> SourceMatrix:
        return SourceMatrix(parts[name, False][expert], parts[name, True][expert], float(scale_2[expert]))

    source = tuple(
        SourceExpert(
            matrix(Projection.GATE, expert, w13) if layout.gated else None,
            matrix(Projection.UP, expert, w13_up),
            matrix(Projection.DOWN, expert, w2),
        )
        for expert in range(dims.experts)
    )
    same = torch.ones(dims.experts, device=device)
    experts = PreparedExperts(
        layout=layout,
        dims=dims,
        w13_weight_scale_2=w13.to(device),
        w2_weight_scale_2=w2.to(device),
        w13_input_scale=same * input_scale,
        w2_input_scale=same * fc2_input_scale,
        w13_weight_scale_2_up=w13_up.to(device) if two_w13_scales else None,
        **prepared,
    )
    return Layer(source, experts, activation, input_scale, fc2_input_scale)
