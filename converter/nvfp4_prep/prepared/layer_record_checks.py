"""Checks of the manifest's record of a layer before anything is done with it: a manifest may be a stranger's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nvfp4_prep.checkpoint.tensors import tensor_nbytes
from nvfp4_prep.formats import Leaf
from nvfp4_prep.moe.layers import MoeLayer, TensorGroup
from nvfp4_prep_kernels import MoeLayout, PreparedTensor, Projection

__all__ = ["check_expert_crc32", "check_gate_up", "check_groups"]

_FIGURES = ("rounded", "underflowed", "worst_relative")


def check_groups(layer: MoeLayer) -> None:
    """Raise ``ValueError`` unless the groups hold every leaf of every projection once, in tensors that can be."""
    wanted = list(Projection) if layer.gated else [Projection.UP, Projection.DOWN]
    have = Counter((projection, group.leaf) for group in layer.groups for projection in group.projections)
    if have != Counter((projection, leaf) for projection in wanted for leaf in Leaf):
        raise ValueError("source_tensors must hold each leaf of each projection once")
    if len({group.key for group in layer.groups}) != len(layer.groups):
        raise ValueError("source_tensors must have names of their own")
    for group in layer.groups:
        (group.head + group.tail).encode("utf-8")
        if group.leaf.is_scalar:
            _check_scalar(group, layer.dims.experts)
        else:
            _check_matrix(group, layer)


def _check_scalar(group: TensorGroup, experts: int) -> None:
    fits = {1, experts} if group.stacked else {1, len(group.projections)}
    if group.dtype != "F32" or math.prod(group.shape) not in fits:
        raise ValueError(f"{group.key} must be one float32 for each expert")


def _check_matrix(group: TensorGroup, layer: MoeLayer) -> None:
    is_scale, is_w13 = group.leaf is Leaf.BLOCK_SCALE, Projection.DOWN not in group.projections
    tensor = next(each for each in PreparedTensor if (each.is_scale, each.is_w13) == (is_scale, is_w13))
    rows, row_nbytes = MoeLayout.cutedsl(gated=layer.gated).source_shape(tensor, layer.dims)  # every layout's
    matrix = (rows * len(group.projections), row_nbytes)
    matrix = matrix[::-1] if group.transposed else matrix
    wanted = (layer.dims.experts, *matrix) if group.stacked else matrix
    if (group.dtype, group.shape) != (tensor.dtype, wanted):
        raise ValueError(f"{group.key} must be of shape {list(wanted)}, as the layer's sizes say")
    tensor_nbytes(group.dtype, group.shape)


def check_expert_crc32(values: Mapping[str, tuple[int, ...]], experts: int) -> None:
    """Raise ``ValueError`` unless every expert has a checksum for each of the four tensors."""
    wanted = {tensor.value: experts for tensor in PreparedTensor}
    if {name: len(numbers) for name, numbers in values.items()} != wanted:
        raise ValueError("expert_crc32 must have one value for each expert, for each of the four tensors")


def check_gate_up(reconciled: Sequence[tuple[int, str]], figures: Mapping[str, Any], layer: MoeLayer) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless sides and figures are what can be worked with."""
    experts = [expert for expert, _ in reconciled]
    if experts != sorted(set(experts)) or any(not 0 <= expert < layer.dims.experts for expert in experts):
        raise ValueError("reconciled must name experts of the layer, in their order, each once")
    if any(side == Projection.DOWN.value for _, side in reconciled) or (experts and not layer.gated):
        raise ValueError("reconciled must name gate or up of gated experts")
    errors: Mapping[str, Any] = figures.get("relative_error", {})
    for value in [figures.get(key, 0) for key in _FIGURES] + list(errors.values()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("figures must be numbers")
    if errors and not {"reconcile", "vllm"} <= errors.keys():
        raise ValueError("relative_error must have a figure for each policy")
