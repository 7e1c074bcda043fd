"""MoeLayout against the index formulas evaluated byte by byte, and back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep.layouts import GATE_UP_BLOCKS, LAYOUTS, LayoutName
from nvfp4_prep_kernels import LayoutError, MoeDims, MoeLayout, PreparedTensor, Projection
from nvfp4_prep_kernels.fingerprint import fingerprint
from nvfp4_prep_kernels.row_order import BlockRows, ShuffledRows, place_of_row, row_at_place
from support.layout_cases import layers, random_parts
from support.layout_oracle import prepare_w2, prepare_w13, rows_of

W13 = (PreparedTensor.W13_WEIGHT, PreparedTensor.W13_WEIGHT_SCALE)
W2 = (PreparedTensor.W2_WEIGHT, PreparedTensor.W2_WEIGHT_SCALE)


def oracle(layout: MoeLayout, tensor: PreparedTensor, parts: list[torch.Tensor]) -> tuple[int, int, bytes]:
    matrices = [rows_of(part) for part in parts]
    if not tensor.is_w13:
        return prepare_w2(
            matrices[0],
            scale=tensor.is_scale,
            moe_tp=layout.moe_tp,
            align_i=layout.intermediate_alignment,
            align_h=layout.hidden_alignment,
            trtllm=layout.shuffled,
        )
    gate, up = matrices if layout.gated else (None, matrices[0])
    return prepare_w13(
        gate,
        up,
        scale=tensor.is_scale,
        block=layout.gate_up_block if layout.interleaved else None,
        moe_tp=layout.moe_tp,
        align_i=layout.intermediate_alignment,
        align_h=layout.hidden_alignment,
        trtllm=layout.shuffled,
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from(list(PreparedTensor)), st.integers(0, 2**31))
def test_apply_gives_the_formula_byte_by_byte(
    layer: tuple[MoeLayout, MoeDims], tensor: PreparedTensor, seed: int
) -> None:
    layout, dims = layer
    layout.check(dims)
    parts = random_parts(layout, tensor, dims, seed)
    rows, cols, expected = oracle(layout, tensor, parts)
    prepared = layout.apply(tensor, *parts)
    assert tuple(prepared.shape) == layout.expert_shape(tensor, dims) == (rows, cols)
    assert prepared.dtype == torch.uint8
    assert bytes(prepared.flatten().tolist()) == expected
    assert layout.expert_nbytes(tensor, dims) == len(expected)


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from(list(PreparedTensor)), st.integers(0, 2**31))
def test_invert_undoes_apply(layer: tuple[MoeLayout, MoeDims], tensor: PreparedTensor, seed: int) -> None:
    layout, dims = layer
    parts = random_parts(layout, tensor, dims, seed)
    back = layout.invert(tensor, layout.apply(tensor, *parts), dims)
    assert len(back) == len(parts)
    for original, returned in zip(parts, back, strict=True):
        assert torch.equal(original, returned)


@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_a_batch_of_experts_equals_expert_by_expert(tensor: PreparedTensor) -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(3, 80, 272)
    experts = [random_parts(layout, tensor, dims, seed) for seed in range(dims.experts)]
    stacked = [torch.stack(parts) for parts in zip(*experts, strict=True)]
    whole = layout.apply(tensor, *stacked)
    assert torch.equal(whole, torch.stack([layout.apply(tensor, *parts) for parts in experts]))
    for part, back in zip(stacked, layout.invert(tensor, whole, dims), strict=True):
        assert torch.equal(part, back)


@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_non_contiguous_input_gives_the_same_bytes(tensor: PreparedTensor) -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(1, 128, 256)
    parts = random_parts(layout, tensor, dims)
    strided = [part.t().contiguous().t() for part in parts]
    assert not any(part.is_contiguous() for part in strided)
    assert torch.equal(layout.apply(tensor, *parts), layout.apply(tensor, *strided))


@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_kimi_shapes(tensor: PreparedTensor) -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(384, 2048, 7168)
    expected = {
        PreparedTensor.W13_WEIGHT: (4096, 3584),
        PreparedTensor.W13_WEIGHT_SCALE: (4096, 448),
        PreparedTensor.W2_WEIGHT: (7168, 1024),
        PreparedTensor.W2_WEIGHT_SCALE: (7168, 128),
    }
    assert layout.expert_shape(tensor, dims) == expected[tensor]
    assert sum(layout.expert_nbytes(each, dims) for each in PreparedTensor) == 24_772_608


def test_projections_and_their_order() -> None:
    gated, relu2 = MoeLayout.cutedsl(gated=True), MoeLayout.cutedsl(gated=False)
    for tensor in W13:
        assert gated.projections(tensor) == (Projection.GATE, Projection.UP)
        assert relu2.projections(tensor) == (Projection.UP,)
    for tensor in W2:
        assert gated.projections(tensor) == relu2.projections(tensor) == (Projection.DOWN,)


@pytest.mark.parametrize(
    ("layout", "dims"),
    [
        (MoeLayout.cutedsl(gated=True), MoeDims(1, 40, 256)),
        (MoeLayout.cutedsl(gated=True), MoeDims(1, 64, 250)),
        (MoeLayout.cutedsl(gated=True), MoeDims(0, 64, 256)),
        (MoeLayout.cutedsl(gated=True, moe_tp=8), MoeDims(1, 64, 256)),
        (MoeLayout.cutedsl_batched(moe_tp=2), MoeDims(1, 128, 256)),
        (MoeLayout.cutedsl(gated=True, moe_tp=3), MoeDims(1, 64, 256)),
        (MoeLayout.cutedsl_batched(), MoeDims(1, 96, 256)),
        (MoeLayout.cutedsl_batched(), MoeDims(1, 64, 192)),
    ],
)
def test_check_refuses_layers_that_do_not_fit(layout: MoeLayout, dims: MoeDims) -> None:
    with pytest.raises(LayoutError):
        layout.check(dims)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MoeLayout.cutedsl(gated=True, gate_up_block=48),
        lambda: MoeLayout.cutedsl(gated=True, moe_tp=0),
        lambda: MoeLayout.trtllm(gated=False, moe_tp=0),
        lambda: MoeLayout(BlockRows(), hidden_alignment=64),
        lambda: MoeLayout(ShuffledRows(gated=True), hidden_alignment=0),
    ],
)
def test_impossible_layouts_cannot_be_made(make: object) -> None:
    with pytest.raises(LayoutError):
        make()  # type: ignore[operator]


def test_wrong_number_of_projections_is_refused() -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(1, 64, 256)
    gate, up = random_parts(layout, PreparedTensor.W13_WEIGHT, dims)
    with pytest.raises(LayoutError, match="gate, up"):
        layout.apply(PreparedTensor.W13_WEIGHT, up)
    with pytest.raises(LayoutError, match="down"):
        layout.apply(PreparedTensor.W2_WEIGHT, gate, up)


@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_invert_refuses_padding_that_is_not_zero(tensor: PreparedTensor) -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(1, 80, 272)
    parts = random_parts(layout, tensor, dims)
    prepared = layout.apply(tensor, *parts)
    holes = (prepared == 0).nonzero()
    assert len(holes) > 0
    for row, col in (holes[0].tolist(), holes[-1].tolist()):
        dirty = prepared.clone()
        dirty[row, col] = 1
        with pytest.raises(ValueError, match="not zero"):
            layout.invert(tensor, dirty, dims)


def test_invert_refuses_another_shape() -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(1, 64, 256)
    with pytest.raises(ValueError, match="does not fit"):
        layout.invert(PreparedTensor.W2_WEIGHT, torch.zeros(256, 64, dtype=torch.uint8), dims)


def test_layouts_that_must_differ_do() -> None:
    """A parameter without influence would make every test above blind to it."""
    dims = MoeDims(1, 128, 256)
    standard = MoeLayout.cutedsl(gated=True)
    parts = random_parts(standard, PreparedTensor.W13_WEIGHT, dims)
    layouts = [MoeLayout.cutedsl(gated=True, gate_up_block=block) for block in (16, 32, 64)]
    layouts.append(MoeLayout.cutedsl_batched())
    layouts.append(MoeLayout.trtllm(gated=True))
    results = [layout.apply(PreparedTensor.W13_WEIGHT, *parts) for layout in layouts]
    assert len({bytes(result.flatten().tolist()) for result in results}) == len(layouts)


TRTLLM = MoeLayout.trtllm(gated=True)


@pytest.mark.parametrize("tensor", list(PreparedTensor))
@pytest.mark.parametrize("gated", [True, False])
def test_trtllm_shares_sizes_with_cutedsl_and_no_bytes(tensor: PreparedTensor, gated: bool) -> None:
    """Same shapes, padding and slices; every tensor differs, w2 too."""
    dims = MoeDims(2, 80, 272)
    cutedsl, trtllm = MoeLayout.cutedsl(gated=gated), MoeLayout.trtllm(gated=gated)
    assert trtllm.stored_shape(tensor, dims) == cutedsl.stored_shape(tensor, dims)
    assert trtllm.tp_sizes(dims) == cutedsl.tp_sizes(dims)
    parts = random_parts(trtllm, tensor, dims)
    assert not torch.equal(trtllm.apply(tensor, *parts), cutedsl.apply(tensor, *parts))


@pytest.mark.parametrize("name", LayoutName)
def test_every_layout_of_the_table_is_made_by_its_name(name: LayoutName) -> None:
    assert MoeLayout.named(name, gated=True, moe_tp=2).name == name
    heights = {MoeLayout.named(name, gated=True, gate_up_block=block).rows for block in GATE_UP_BLOCKS}
    assert len(heights) == (len(GATE_UP_BLOCKS) if LAYOUTS[name].has_blocks else 1)


def test_a_name_without_a_layout() -> None:
    with pytest.raises(LayoutError, match="unknown layout 'marlin'"):
        MoeLayout.named("marlin", gated=True)
    with pytest.raises(LayoutError, match="SiLU-gated experts only"):
        MoeLayout.named("cutedsl-batched", gated=False)


@pytest.mark.parametrize("layout", [MoeLayout.cutedsl(gated=True), TRTLLM], ids=["cutedsl", "trtllm"])
@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_results_lie_in_memory_of_the_caller(layout: MoeLayout, tensor: PreparedTensor) -> None:
    dims = MoeDims(3, 192, 320)  # H is padded, so that every tensor needs memory
    parts = [torch.stack([part, part ^ 1, part ^ 2]) for part in random_parts(layout, tensor, dims)]
    expected = layout.apply(tensor, *parts)
    taken: list[torch.Tensor] = []

    def dirty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        taken.append(torch.full(tuple(shape), 0xA5, dtype=like.dtype))
        return taken[-1]

    made = layout.apply(tensor, *parts, empty=dirty)
    assert torch.equal(made, expected)
    assert any(made.data_ptr() == memory.data_ptr() for memory in taken)
    for part, back in zip(parts, layout.invert(tensor, made, dims, dirty), strict=True):
        assert torch.equal(part, back)


@pytest.mark.parametrize(
    "layout",
    [
        TRTLLM,
        MoeLayout.trtllm(gated=False),
        MoeLayout.cutedsl(gated=True),
        MoeLayout.cutedsl(gated=True, gate_up_block=16),
        MoeLayout.cutedsl(gated=False),
        MoeLayout.cutedsl_batched(),
    ],
    ids=["trtllm", "trtllm relu2", "cutedsl", "cutedsl 16", "cutedsl relu2", "batched"],
)
@pytest.mark.parametrize("tensor", [PreparedTensor.W13_WEIGHT, PreparedTensor.W2_WEIGHT])
def test_index_formula_of_a_row_order_is_what_apply_does(layout: MoeLayout, tensor: PreparedTensor) -> None:
    dims = MoeDims(1, 256, 256)
    parts = random_parts(layout, tensor, dims)
    prepared = layout.apply(tensor, *parts)
    half_rows = len(parts[0])
    for place in range(len(prepared)):
        half, row = row_at_place(layout.rows, fused=tensor.is_w13, place=place, half_rows=half_rows)
        assert torch.equal(prepared[place], parts[half][row])
        back = place_of_row(layout.rows, fused=tensor.is_w13, half=half, row=row, half_rows=half_rows)
        assert back == place


def test_stored_dtypes() -> None:
    assert [tensor.dtype for tensor in PreparedTensor] == ["U8", "F8_E4M3", "U8", "F8_E4M3"]


def test_two_w13_scales_are_for_gated_trtllm_alone() -> None:
    assert TRTLLM.takes_two_w13_scales
    others = (MoeLayout.trtllm(gated=False), MoeLayout.cutedsl(gated=True), MoeLayout.cutedsl_batched())
    assert not any(layout.takes_two_w13_scales for layout in others)


FINGERPRINTS = {
    "cutedsl": (MoeLayout.cutedsl(gated=True), "8e2989b3f2cb4a1c3b4865df62a0f122a0ac5947ff1d902048414c2b9ff2d5ad"),
    "cutedsl relu2": (
        MoeLayout.cutedsl(gated=False),
        "1c0a01f90bd1ce187a11d553d9b9597bc7af963ab6722495adb399ab3f7763cf",
    ),
    "batched": (MoeLayout.cutedsl_batched(), "06d87b7572882eec0e1accf068ec363f85477d6780c0e16589e9f9ae43cef414"),
    "trtllm": (TRTLLM, "7576c6acb5f75f6e34291078b68e045ad46b73b4f461f9986fee0972a9acf9eb"),
    "trtllm relu2": (MoeLayout.trtllm(gated=False), "30dc23e099a0c18b85d13fa299b88b088c9fa86842d4bc043591b7ae1ff71f5b"),
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_never_change(name: str) -> None:
    """They are stored in checkpoints."""
    layout, expected = FINGERPRINTS[name]
    assert fingerprint(layout) == fingerprint(layout.for_moe_tp(2)) == expected
