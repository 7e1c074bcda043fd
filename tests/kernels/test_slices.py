"""The slice theorem: a rank's share of the prepared whole is the preparation of the rank's share of the source."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep_kernels import LayoutError, MoeDims, MoeLayout, PreparedTensor, rank_slice, take_rank
from support.layout_cases import random_parts


def source_share(part: torch.Tensor, tensor: PreparedTensor, rank: int, size: int) -> torch.Tensor:
    """A rank's share of one projection of the source: rows of gate and up, columns of down."""
    return part.chunk(size, dim=0 if tensor.is_w13 else 1)[rank]


def prepared_share(
    layout: MoeLayout, tensor: PreparedTensor, parts: list[torch.Tensor], rank: int, size: int
) -> torch.Tensor:
    """What the server itself would make of the rank's share."""
    return layout.for_moe_tp(1).apply(tensor, *(source_share(part, tensor, rank, size) for part in parts))


def formula_share(
    layout: MoeLayout, tensor: PreparedTensor, prepared: torch.Tensor, dims: MoeDims, rank: int, size: int
) -> torch.Tensor:
    """The slice formulas of the layout description, with plain tensor indexing."""
    share = layout.padded_intermediate(dims.intermediate) // size
    halves = 2 if layout.gated else 1
    if tensor.is_w13:
        return prepared[halves * rank * share : halves * (rank + 1) * share]
    if tensor is PreparedTensor.W2_WEIGHT:
        return prepared[:, rank * share // 2 : (rank + 1) * share // 2]
    rows, cols = prepared.shape
    tiles = prepared.reshape(rows // 128, cols // 4, 512)
    return tiles[:, rank * share // 64 : (rank + 1) * share // 64].reshape(rows, share // 16)


@st.composite
def sliceable(draw: st.DrawFn) -> tuple[MoeLayout, MoeDims, int]:
    """A layer, and a tensor-parallel size whose shares need no padding, or for which the file was padded."""
    gated, size = draw(st.booleans()), draw(st.sampled_from([1, 2, 3, 4, 8]))
    step = 64 if gated else 128
    padded_for_size = draw(st.booleans())
    share = 16 * draw(st.integers(1, 16)) if padded_for_size else step * draw(st.integers(1, 3))
    block = draw(st.sampled_from([16, 32, 64]))
    moe_tp = size if padded_for_size else 1
    if draw(st.booleans()):
        layout = MoeLayout.trtllm(gated=gated, moe_tp=moe_tp)
    else:
        layout = MoeLayout.cutedsl(gated=gated, gate_up_block=block, moe_tp=moe_tp)
    return layout, MoeDims(1, size * share, 16 * draw(st.integers(1, 20))), size


@settings(max_examples=60, deadline=None)
@given(sliceable(), st.sampled_from(list(PreparedTensor)), st.integers(0, 2**31))
def test_slicing_the_prepared_whole_equals_preparing_the_slice(
    case: tuple[MoeLayout, MoeDims, int], tensor: PreparedTensor, seed: int
) -> None:
    layout, dims, size = case
    parts = random_parts(layout, tensor, dims, seed)
    prepared = layout.apply(tensor, *parts)
    assert size in layout.tp_sizes(dims)
    for rank in range(size):
        taken = take_rank(layout, tensor, prepared, dims, rank, size)
        assert torch.equal(taken, prepared_share(layout, tensor, parts, rank, size))
        assert torch.equal(taken, formula_share(layout, tensor, prepared, dims, rank, size))


@pytest.mark.parametrize("inter_per_rank", [96, 352])
@pytest.mark.parametrize("tensor", [PreparedTensor.W13_WEIGHT, PreparedTensor.W2_WEIGHT_SCALE])
def test_counter_examples(inter_per_rank: int, tensor: PreparedTensor) -> None:
    """Where a share is no multiple of 64 the whole cannot be cut: refused, and rightly so."""
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(1, 2 * inter_per_rank, 256)
    assert 2 not in layout.tp_sizes(dims)
    with pytest.raises(LayoutError, match="--moe-tp 2"):
        rank_slice(layout, tensor, dims, 0, 2)
    parts = random_parts(layout, tensor, dims)
    prepared = layout.apply(tensor, *parts)
    wanted = prepared_share(layout, tensor, parts, 1, 2)
    rows, cols = prepared.shape
    cut = prepared[rows // 2 :] if tensor.is_w13 else prepared[:, cols // 2 :]
    assert cut.shape != wanted.shape or not torch.equal(cut, wanted)
    # … and the file made for two ranks serves them.
    for_two = layout.for_moe_tp(2)
    taken = take_rank(for_two, tensor, for_two.apply(tensor, *parts), dims, 1, 2)
    assert torch.equal(taken, wanted)


@pytest.mark.parametrize("tensor", list(PreparedTensor))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_runs_cover_each_byte_exactly_once(tensor: PreparedTensor, size: int) -> None:
    for layout in (
        MoeLayout.cutedsl(gated=True),
        MoeLayout.cutedsl_batched(),
        MoeLayout.cutedsl(gated=False),
        MoeLayout.trtllm(gated=True),
        MoeLayout.trtllm(gated=False),
    ):
        dims = MoeDims(1, 512, 256)
        seen = bytearray(layout.expert_nbytes(tensor, dims))
        for rank in range(size):
            part = rank_slice(layout, tensor, dims, rank, size)
            assert part.nbytes == part.shape[0] * part.shape[1] == len(seen) // size
            for run in range(part.runs):
                start = part.offset_bytes + run * part.stride_bytes
                for byte in range(start, start + part.run_nbytes):
                    seen[byte] += 1
        assert set(seen) == {1}


@pytest.mark.parametrize("size", [2, 4])
def test_batched_layout_takes_a_run_of_each_half(size: int) -> None:
    layout, dims = MoeLayout.cutedsl_batched(), MoeDims(1, 512, 256)
    for tensor in PreparedTensor:
        parts = random_parts(layout, tensor, dims)
        prepared = layout.apply(tensor, *parts)
        for rank in range(size):
            taken = take_rank(layout, tensor, prepared, dims, rank, size)
            assert torch.equal(taken, prepared_share(layout, tensor, parts, rank, size))


def test_take_rank_over_experts() -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(3, 128, 256)
    for tensor in PreparedTensor:
        experts = [random_parts(layout, tensor, dims, seed) for seed in range(dims.experts)]
        prepared = layout.apply(tensor, *(torch.stack(parts) for parts in zip(*experts, strict=True)))
        taken = take_rank(layout, tensor, prepared, dims, 1, 2)
        assert taken.is_contiguous()
        for expert in range(3):
            assert torch.equal(taken[expert], take_rank(layout, tensor, prepared[expert], dims, 1, 2))


def test_ranks_that_do_not_exist() -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(1, 128, 256)
    for rank, size in ((2, 2), (-1, 2)):
        with pytest.raises(LayoutError, match="does not exist"):
            rank_slice(layout, PreparedTensor.W13_WEIGHT, dims, rank, size)


def test_sizes_that_published_models_can_be_served_at() -> None:
    gated, relu2 = MoeLayout.cutedsl(gated=True), MoeLayout.cutedsl(gated=False)
    assert gated.tp_sizes(MoeDims(384, 2048, 7168)) == (1, 2, 4, 8, 16, 32)
    assert gated.tp_sizes(MoeDims(128, 768, 2048)) == (1, 2, 3, 4, 6, 12)  # Qwen3-30B-A3B: not 8
    assert relu2.tp_sizes(MoeDims(128, 1856, 2688)) == (1,)  # Nemotron-3-Nano: whole only
    assert relu2.for_moe_tp(4).tp_sizes(MoeDims(128, 1856, 2688)) == (4,)
    # made for more ranks than are listed otherwise
    assert gated.for_moe_tp(128).tp_sizes(MoeDims(8, 128 * 80, 256)) == (128,)
    assert rank_slice(gated.for_moe_tp(128), PreparedTensor.W13_WEIGHT, MoeDims(8, 128 * 80, 256), 127, 128).runs == 1
