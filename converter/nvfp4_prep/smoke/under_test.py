"""A layer under test: its prepared bytes, its source, and the checks that need no kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nvfp4_prep_kernels import UP_SCALE_VECTOR, PreparedTensor
from nvfp4_prep_kernels.moe_reference import SourceExpert
from nvfp4_prep_kernels.moe_types import MoeActivation, PreparedExperts

__all__ = ["LayerUnderTest", "dirty_padding", "wrong_scalars"]


@dataclass(frozen=True)
class LayerUnderTest:
    """One layer, prepared and as its source has it.

    Attributes:
        name, index: module path of the experts and the model's layer number.
        experts: numbers of the experts that ``prepared`` holds.
        experts_total: of the whole layer.
        prepared: the bytes under test.
        source: position in ``experts`` to the expert's source tensors, on the device of ``prepared``.
        activation, top_k: of the model.
        input_scale, fc2_input_scale: the source's, largest over the whole layer.
        w13_scale_2, w2_scale_2: the source's global scales of ``experts``.
        w13_scale_2_up: up's where the kernel takes it beside gate's.
    """

    name: str
    index: int
    experts: tuple[int, ...]
    experts_total: int
    prepared: PreparedExperts
    source: Callable[[int], SourceExpert]
    activation: MoeActivation
    top_k: int
    input_scale: float
    fc2_input_scale: float
    w13_scale_2: tuple[float, ...]
    w2_scale_2: tuple[float, ...]
    w13_scale_2_up: tuple[float, ...] | None = None


def dirty_padding(prepared: PreparedExperts) -> int:
    """Count the padding bytes that are not zero, over the four tensors."""
    layout, dims = prepared.layout, prepared.dims
    dirty = 0
    for tensor in PreparedTensor:
        source = torch.ones(layout.source_shape(tensor, dims), dtype=torch.uint8, device=prepared.w13_weight.device)
        real = layout.apply(tensor, *[source for _ in layout.projections(tensor)])
        padding = (real == 0).nonzero(as_tuple=True)
        if len(padding[0]):
            stored: torch.Tensor = getattr(prepared, tensor.value)
            dirty += sum(int((expert[padding] != 0).sum()) for expert in stored)
    return dirty


def wrong_scalars(layer: LayerUnderTest) -> Iterator[str]:
    """Yield, in words, the scalars of the prepared file that are not, bit for bit, what the source says."""
    prepared = layer.prepared
    up = [] if layer.w13_scale_2_up is None else [(UP_SCALE_VECTOR, layer.w13_scale_2_up)]
    for name, wanted in (
        *up,
        ("w13_weight_scale_2", layer.w13_scale_2),
        ("w2_weight_scale_2", layer.w2_scale_2),
        ("w13_input_scale", [layer.input_scale] * len(layer.experts)),
        ("w2_input_scale", [layer.fc2_input_scale] * len(layer.experts)),
    ):
        found = getattr(prepared, name).cpu()
        expected = torch.tensor(wanted, dtype=torch.float32)
        wrong = (found != expected).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            yield (
                f"{name} of {len(wrong)} experts, expert {layer.experts[first]}: {float(found[first])!r} instead of"
                f" {float(expected[first])!r}"
            )
