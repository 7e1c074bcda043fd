"""Loaded parameters rearranged for another kernel in place: on a GPU by Triton, here by torch; needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep.serving.relayout_at_load import RelayoutAtLoad
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, take_rank

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Kind = Callable[[bool, int], MoeLayout]
KINDS: dict[str, Kind] = {
    "cutedsl": lambda gated, moe_tp: MoeLayout.cutedsl(gated=gated, moe_tp=moe_tp),
    "cutedsl, 16 rows": lambda gated, moe_tp: MoeLayout.cutedsl(gated=gated, gate_up_block=16, moe_tp=moe_tp),
    "trtllm": lambda gated, moe_tp: MoeLayout.trtllm(gated=gated, moe_tp=moe_tp),
    "batched": lambda gated, moe_tp: MoeLayout.cutedsl_batched(moe_tp=moe_tp),
}


def loaded(layout: MoeLayout, dims: MoeDims, rank: int, size: int) -> torch.nn.Module:
    """One rank's parameters, cut out of the prepared whole."""
    module = torch.nn.Module()
    for number, tensor in enumerate(PreparedTensor):
        generator = torch.Generator().manual_seed(number)
        shape = (dims.experts, *layout.source_shape(tensor, dims))
        parts = [
            torch.randint(1, 120, shape, dtype=torch.uint8, generator=generator) for _ in layout.projections(tensor)
        ]
        share = take_rank(layout, tensor, layout.apply(tensor, *parts), dims, rank, size)
        data = share.contiguous().view(tensor.torch_dtype).to(DEVICE)
        module.register_parameter(tensor.value, torch.nn.Parameter(data, requires_grad=False))
    return module


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize(
    ("dims", "moe_tp", "size"),
    [
        (MoeDims(3, 256, 512), 1, 1),
        (MoeDims(3, 256, 512), 1, 2),
        (MoeDims(2, 192, 256), 2, 2),
        (MoeDims(2, 80, 272), 1, 1),
    ],
    ids=["whole", "TP2", "padded for TP2", "padded"],
)
def test_any_rank_from_any_layout(source: str, target: str, dims: MoeDims, moe_tp: int, size: int) -> None:
    """The rank's share of the other layout's whole, in the same memory."""
    old, new = KINDS[source](True, moe_tp), KINDS[target](True, moe_tp)
    batched = "batched" in (source, target)
    if batched and (dims.intermediate // size % 128 or dims.hidden % 256):
        pytest.skip("the batched kernel pads nothing")
    for rank in range(size):
        layer, expected = loaded(old, dims, rank, size), loaded(new, dims, rank, size)
        places = {name: param.data_ptr() for name, param in layer.named_parameters()}
        conversion = RelayoutAtLoad.of_share(old, new, dims, size)
        conversion.check("layer", "--moe-backend")
        conversion.convert(layer)
        for name, param in layer.named_parameters():
            assert param.data_ptr() == places[name]
            want = expected.get_parameter(name)
            assert torch.equal(param.view(torch.uint8), want.view(torch.uint8)), (name, rank)


@pytest.mark.parametrize("dims", [MoeDims(2, 80, 256), MoeDims(2, 128, 384)], ids=["I 80", "H 384"])
def test_what_the_batched_kernel_does_not_take_is_refused(dims: MoeDims) -> None:
    conversion = RelayoutAtLoad.of_share(KINDS["trtllm"](True, 1), KINDS["batched"](True, 1), dims, 1)
    with pytest.raises(ServingError, match="cannot be rearranged"):
        conversion.check("layer", "--moe-backend")


def test_experts_without_gate() -> None:
    dims = MoeDims(2, 256, 512)
    old, new = KINDS["cutedsl"](False, 1), KINDS["trtllm"](False, 1)
    layer, expected = loaded(old, dims, 1, 2), loaded(new, dims, 1, 2)
    RelayoutAtLoad.of_share(old, new, dims, 2).convert(layer)
    for name, param in layer.named_parameters():
        assert torch.equal(param.view(torch.uint8), expected.get_parameter(name).view(torch.uint8)), name
