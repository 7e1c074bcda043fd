"""Shares without the padding of H: against the same layer in a layout that pads H to 128 only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nvfp4_prep.serving.hidden_padding import can_drop_hidden_padding, drop_hidden_padding
from nvfp4_prep.serving.placement import Placement
from nvfp4_prep_kernels import LayoutError, MoeDims, MoeLayout, PreparedTensor, rank_slice, take_rank
from nvfp4_prep_kernels.slices import take_slice

LAYOUTS = {
    "cutedsl": MoeLayout.cutedsl(gated=True),
    "blocks of 16": MoeLayout.cutedsl(gated=True, gate_up_block=16),
    "not gated": MoeLayout.cutedsl(gated=False),
    "trtllm": MoeLayout.trtllm(gated=True),
    "trtllm, not gated": MoeLayout.trtllm(gated=False),
    "padded I": MoeLayout.cutedsl(gated=True, moe_tp=2),
}
DIMS = {name: MoeDims(3, 192 if name == "padded I" else 256, 384) for name in LAYOUTS}


def source(layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(tensor.value))
    shape = (dims.experts, *layout.source_shape(tensor, dims))
    return tuple(torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in layout.projections(tensor))


@pytest.mark.parametrize("tensor", PreparedTensor)
@pytest.mark.parametrize("rank", [(0, 1), (1, 2)], ids=["whole", "rank 1 of 2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_share_is_that_of_a_file_without_the_padding(name: str, rank: tuple[int, int], tensor: PreparedTensor) -> None:
    layout, dims = LAYOUTS[name], DIMS[name]
    if rank[1] not in layout.tp_sizes(dims):
        pytest.skip("a file in this layout does not serve this size")
    tight = replace(layout, hidden_alignment=128)
    parts = source(layout, tensor, dims)
    part = drop_hidden_padding(rank_slice(layout, tensor, dims, *rank), tensor, 512, 384)
    expected = take_rank(tight, tensor, tight.apply(tensor, *parts), dims, *rank)
    taken = take_slice(layout.apply(tensor, *parts), part)
    assert torch.equal(taken, expected)
    assert part.nbytes == expected[0].numel()


def test_nothing_changes_without_padding() -> None:
    layout, dims = LAYOUTS["cutedsl"], MoeDims(2, 256, 512)
    part = rank_slice(layout, PreparedTensor.W13_WEIGHT, dims, 0, 2)
    assert drop_hidden_padding(part, PreparedTensor.W13_WEIGHT, 512, 512) is part


@pytest.mark.parametrize(("hidden", "can"), [(128, True), (2688, True), (2880, False), (320, False)])
def test_tiles_of_their_own(hidden: int, can: bool) -> None:
    assert can_drop_hidden_padding(hidden) is can
    layout, dims = LAYOUTS["cutedsl"], MoeDims(2, 256, hidden)
    part = rank_slice(layout, PreparedTensor.W2_WEIGHT, dims, 0, 1)
    if not can:
        with pytest.raises(LayoutError, match="not in tiles of its own"):
            drop_hidden_padding(part, PreparedTensor.W2_WEIGHT, layout.padded_hidden(hidden), hidden)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("tensor", PreparedTensor)
def test_placement_without_the_padding(tensor: PreparedTensor, tp_size: int) -> None:
    layout, dims = LAYOUTS["trtllm"], DIMS["trtllm"]
    place = Placement("experts", layout, dims, tp_size - 1, tp_size, experts=(2, 0), keep_hidden_padding=False)
    tight = replace(layout, hidden_alignment=128)
    parts = source(layout, tensor, dims)
    dtype = place.dtype(tensor.value)
    param = torch.zeros(place.local_shape(tensor.value), dtype=torch.uint8).view(dtype)
    place.fill(tensor.value, param, layout.apply(tensor, *parts).view(dtype))
    whole = take_rank(tight, tensor, tight.apply(tensor, *parts), dims, tp_size - 1, tp_size)
    assert torch.equal(param.view(torch.uint8), whole[[2, 0]])
