"""Bytes of one layout become those of another inside tiles of 128 rows: torch and Triton, in place and out of place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep_kernels import LayoutError, MoeDims, MoeLayout, PreparedTensor, take_rank
from nvfp4_prep_kernels.tile_relayout import can_relayout, keeps_tiles, relayout_tiles, tile_sources
from nvfp4_prep_kernels.triton_relayout import relayout
from support.layout_cases import random_parts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Relayout = Callable[..., torch.Tensor]
BOTH = pytest.mark.parametrize("convert", [relayout_tiles, relayout], ids=["torch", "triton"])
GATED = (
    MoeLayout.trtllm(gated=True),
    *(MoeLayout.cutedsl(gated=True, gate_up_block=block) for block in (16, 32, 64)),
)
RELU2 = (MoeLayout.trtllm(gated=False), MoeLayout.cutedsl(gated=False))
TRTLLM, CUTEDSL = GATED[0], GATED[-1]


def both_layouts(
    tensor: PreparedTensor, dims: MoeDims, old: MoeLayout, new: MoeLayout, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """All experts prepared from the source in each layout."""
    experts = [random_parts(old, tensor, dims, seed + expert) for expert in range(dims.experts)]
    made = (torch.stack([layout.apply(tensor, *parts) for parts in experts]).to(DEVICE) for layout in (old, new))
    return next(made), next(made)


@st.composite
def conversions(draw: st.DrawFn) -> tuple[MoeLayout, MoeLayout, MoeDims]:
    """Two layouts of one family and a layer, padded or not."""
    family = draw(st.sampled_from([GATED, RELU2]))
    old, new = draw(st.sampled_from(family)), draw(st.sampled_from(family))
    moe_tp = draw(st.integers(1, 2))
    dims = MoeDims(draw(st.integers(1, 3)), moe_tp * 16 * draw(st.integers(1, 8)), 16 * draw(st.integers(1, 20)))
    return old.for_moe_tp(moe_tp), new.for_moe_tp(moe_tp), dims


@pytest.mark.slow
@BOTH
@settings(max_examples=25, deadline=None)
@given(conversions(), st.sampled_from(list(PreparedTensor)), st.integers(0, 2**31), st.booleans())
def test_converted_bytes_are_those_of_the_other_layout(
    convert: Relayout, case: tuple[MoeLayout, MoeLayout, MoeDims], tensor: PreparedTensor, seed: int, in_place: bool
) -> None:
    old, new, dims = case
    have, want = both_layouts(tensor, dims, old, new, seed)
    before = have.clone()
    out = have if in_place else torch.full_like(have, 0xA5)
    assert convert(tensor, have, old, new, out=out) is out
    assert torch.equal(out, want)
    if not in_place:
        assert torch.equal(have, before)
    assert torch.equal(convert(tensor, out, new, old), before)


@BOTH
@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_a_rank_converts_its_share_alone(convert: Relayout, tensor: PreparedTensor) -> None:
    dims = MoeDims(2, 256, 256)
    have, want = both_layouts(tensor, dims, CUTEDSL, TRTLLM)
    for rank in range(4):
        share = take_rank(CUTEDSL, tensor, have, dims, rank, 4)
        assert torch.equal(convert(tensor, share, CUTEDSL, TRTLLM), take_rank(TRTLLM, tensor, want, dims, rank, 4))


@BOTH
@pytest.mark.parametrize("tensor", [PreparedTensor.W2_WEIGHT, PreparedTensor.W2_WEIGHT_SCALE])
def test_w2_of_the_batched_layout_converts_too(convert: Relayout, tensor: PreparedTensor) -> None:
    dims = MoeDims(2, 128, 256)
    batched = MoeLayout.cutedsl_batched()
    have, want = both_layouts(tensor, dims, batched, TRTLLM)
    assert torch.equal(convert(tensor, have, batched, TRTLLM), want)
    assert torch.equal(convert(tensor, want, TRTLLM, batched), have)


@BOTH
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (CUTEDSL, MoeLayout.cutedsl_batched()),
        (MoeLayout.cutedsl_batched(), TRTLLM),
        (CUTEDSL, MoeLayout.trtllm(gated=False)),
        (CUTEDSL, TRTLLM.for_moe_tp(2)),
    ],
    ids=["to batched", "from batched", "gated and not", "other padding"],
)
def test_what_leaves_its_tile_is_refused(convert: Relayout, old: MoeLayout, new: MoeLayout) -> None:
    assert not can_relayout(old, new)
    prepared = torch.zeros(1, 256, 128, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(LayoutError, match="inside tiles"):
        convert(PreparedTensor.W13_WEIGHT, prepared, old, new)


@BOTH
@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        (torch.zeros(1, 192, 128, dtype=torch.uint8), "not whole tiles"),
        (torch.zeros(1, 128, 128, dtype=torch.int8), "must be contiguous"),
        (torch.zeros(1, 128, 256, dtype=torch.uint8)[..., ::2], "must be contiguous"),
    ],
    ids=["rows", "dtype", "strides"],
)
def test_bytes_that_are_not_whole_tiles_are_refused(convert: Relayout, prepared: torch.Tensor, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        convert(
            PreparedTensor.W2_WEIGHT, prepared.to(DEVICE) if prepared.is_contiguous() else prepared, CUTEDSL, TRTLLM
        )


@BOTH
def test_output_that_does_not_fit_is_refused(convert: Relayout) -> None:
    memory = torch.zeros(3, 128, 128, dtype=torch.uint8, device=DEVICE)
    tensor = PreparedTensor.W2_WEIGHT
    with pytest.raises(LayoutError, match="overlaps"):
        convert(tensor, memory[:2], CUTEDSL, TRTLLM, out=memory[1:])
    with pytest.raises(LayoutError, match="out is"):
        convert(tensor, memory[:2], CUTEDSL, TRTLLM, out=memory)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("old", GATED)
@pytest.mark.parametrize("new", GATED)
def test_tile_permutations_are_inverse_to_each_other(old: MoeLayout, new: MoeLayout, fused: bool) -> None:
    there, back = (tile_sources(a.rows, b.rows, fused=fused) for a, b in ((old, new), (new, old)))
    assert [there[place] for place in back] == list(range(128))


def test_tile_permutation_from_the_published_formula() -> None:
    """Row 1 of a TRTLLM tile is fused row 4: up row 2; row 8 is fused row 1: gate row 0."""
    order = tile_sources(CUTEDSL.rows, TRTLLM.rows, fused=True)
    assert order[:4] == (0, 2, 4, 6)
    assert order[8:12] == (64, 66, 68, 70)
    assert order[16] == 1
    assert tile_sources(CUTEDSL.rows, TRTLLM.rows, fused=False)[:10] == (0, 4, 8, 12, 16, 20, 24, 28, 1, 5)


def test_layouts_with_equal_rows_copy() -> None:
    prepared = torch.randint(0, 256, (1, 128, 64), dtype=torch.uint8, device=DEVICE)
    for convert in (relayout_tiles, relayout):
        made = convert(PreparedTensor.W13_WEIGHT, prepared, TRTLLM, replace(TRTLLM))
        assert torch.equal(made, prepared) and made.data_ptr() != prepared.data_ptr()


@pytest.mark.parametrize("tensor", list(PreparedTensor))
@pytest.mark.parametrize("new", GATED)
@pytest.mark.parametrize("old", GATED)
def test_tensors_that_are_the_same_in_both_layouts(old: MoeLayout, new: MoeLayout, tensor: PreparedTensor) -> None:
    have, want = both_layouts(tensor, MoeDims(1, 256, 256), old, new)
    assert keeps_tiles(old, new, tensor) == torch.equal(have, want)
