"""The Triton kernels give the torch reference's bytes, for every shape, both ways (interpreter here, card by hand)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep_kernels import LayoutError, MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.triton_prepare import prepare, unprepare
from support.layout_cases import layers
from support.paths import SUPPORT

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TESTS = SUPPORT
EXAMPLES = 60 if DEVICE.type == "cpu" else 25  # each is compiled on a card


def stacked_parts(layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (dims.experts, *layout.source_shape(tensor, dims))
    return [
        torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)
        for _ in layout.projections(tensor)
    ]


@settings(max_examples=EXAMPLES, deadline=None)
@given(layers(), st.sampled_from(list(PreparedTensor)), st.integers(0, 2**31), st.booleans())
def test_both_directions_give_the_reference_bytes(
    layer: tuple[MoeLayout, MoeDims], tensor: PreparedTensor, seed: int, per_expert: bool
) -> None:
    layout, dims = layer
    parts = stacked_parts(layout, tensor, dims, seed)
    given_parts = [[matrix.clone() for matrix in part] for part in parts] if per_expert else parts
    out = torch.full((dims.experts, *layout.expert_shape(tensor, dims)), 0xA5, dtype=torch.uint8, device=DEVICE)
    prepared = prepare(layout, tensor, dims, *given_parts, out=out)
    assert prepared is out
    assert torch.equal(prepared, layout.apply(tensor, *parts))
    back = unprepare(layout, tensor, prepared, dims)
    assert len(back) == len(parts)
    for original, returned in zip(parts, back, strict=True):
        assert torch.equal(original, returned)


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_any_alignment(tensor: PreparedTensor, shift: int) -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(2, 80, 272)
    parts = stacked_parts(layout, tensor, dims)
    shifted = []
    for part in parts:
        room = torch.zeros(part.numel() + 16, dtype=torch.uint8, device=DEVICE)
        skip = (shift - room.data_ptr()) % 16
        shifted.append(room[skip : skip + part.numel()].view(part.shape).copy_(part))
    assert all(part.data_ptr() % 16 == shift for part in shifted)
    assert torch.equal(prepare(layout, tensor, dims, *shifted), layout.apply(tensor, *parts))


def test_rows_of_a_fused_tensor_are_read_in_place() -> None:
    """Halves of a stacked w13 and every second row of a SWIGLUOAI checkpoint are strided views."""
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(2, 64, 256)
    for tensor in (PreparedTensor.W13_WEIGHT, PreparedTensor.W13_WEIGHT_SCALE):
        gate, up = stacked_parts(layout, tensor, dims)
        expected = layout.apply(tensor, gate, up)
        fused = torch.cat((gate, up), dim=1)
        assert torch.equal(prepare(layout, tensor, dims, fused[:, :64], fused[:, 64:]), expected)
        alternating = torch.stack((gate, up), dim=2).flatten(1, 2)
        assert torch.equal(prepare(layout, tensor, dims, alternating[:, 0::2], alternating[:, 1::2]), expected)


def test_columns_that_are_apart_are_copied_first() -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(2, 64, 256)
    gate, up = stacked_parts(layout, PreparedTensor.W13_WEIGHT, dims)
    transposed = gate.transpose(1, 2).contiguous().transpose(1, 2)
    assert transposed.stride(2) != 1
    expected = layout.apply(PreparedTensor.W13_WEIGHT, gate, up)
    assert torch.equal(prepare(layout, PreparedTensor.W13_WEIGHT, dims, transposed, up), expected)
    assert torch.equal(prepare(layout, PreparedTensor.W13_WEIGHT, dims, list(transposed), list(up)), expected)


def test_rows_of_one_byte_are_read_whatever_strides_they_claim() -> None:
    """torch calls a transposed column contiguous, although the stride inside its rows of one byte is not 1."""
    layout, dims, tensor = MoeLayout.cutedsl(gated=True), MoeDims(2, 16, 256), PreparedTensor.W2_WEIGHT_SCALE
    (down,) = stacked_parts(layout, tensor, dims)
    transposed = down.reshape(2, 1, 256).transpose(1, 2)
    assert transposed.is_contiguous() and transposed.stride(2) == 256
    assert torch.equal(prepare(layout, tensor, dims, transposed), layout.apply(tensor, down))
    assert torch.equal(prepare(layout, tensor, dims, list(transposed)), layout.apply(tensor, down))


@pytest.mark.parametrize(
    ("moe_tp", "dims"),
    [(2, MoeDims(2, 160, 272)), (1, MoeDims(2, 192, 320))],
    ids=["scales byte by byte", "scales word by word"],
)
@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_dirty_padding_is_found_on_the_way_back(tensor: PreparedTensor, moe_tp: int, dims: MoeDims) -> None:
    layout = MoeLayout.cutedsl(gated=True, moe_tp=moe_tp)
    prepared = prepare(layout, tensor, dims, *stacked_parts(layout, tensor, dims))
    holes = (prepared == 0).nonzero()
    for hole in (holes[0], holes[len(holes) // 2], holes[-1]):
        dirty = prepared.clone()
        dirty[tuple(hole.tolist())] = 0x80
        with pytest.raises(ValueError, match="not zero"):
            unprepare(layout, tensor, dirty, dims)


def test_wrong_input_is_refused() -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(2, 64, 256)
    tensor = PreparedTensor.W13_WEIGHT
    gate, up = stacked_parts(layout, tensor, dims)
    with pytest.raises(LayoutError, match="takes 2 projections"):
        prepare(layout, tensor, dims, up)
    with pytest.raises(LayoutError, match="1 experts of the up projection, not 2"):
        prepare(layout, tensor, dims, gate, up[:1])
    with pytest.raises(LayoutError, match="up projection is"):
        prepare(layout, tensor, dims, list(gate), [up[0], up[1, :32]])
    with pytest.raises(LayoutError, match=r"up projection is torch\.int8"):
        prepare(layout, tensor, dims, gate, up.view(torch.int8))
    good = prepare(layout, tensor, dims, gate, up)
    with pytest.raises(LayoutError, match="out is"):
        prepare(layout, tensor, dims, gate, up, out=good[:1])
    with pytest.raises(LayoutError, match="prepared is"):
        unprepare(layout, tensor, good.transpose(1, 2), dims)
    elsewhere = torch.empty(0, dtype=torch.uint8, device="meta")
    with pytest.raises(LayoutError, match="out is on meta, the parts are on"):
        prepare(layout, tensor, dims, gate, up, out=elsewhere.new_empty(good.shape))
    with pytest.raises(LayoutError, match=r"parts are on .* and .*, must be on one device"):
        prepare(layout, tensor, dims, gate, [up[0], elsewhere.new_empty(up[1].shape)])


@pytest.mark.parametrize("skip", [1, 2, 4])
@pytest.mark.parametrize("tensor", list(PreparedTensor))
def test_prepared_memory_begins_at_a_word(tensor: PreparedTensor, skip: int) -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(2, 64, 256)
    parts = stacked_parts(layout, tensor, dims)
    expected = layout.apply(tensor, *parts)
    room = torch.zeros(expected.numel() + 16, dtype=torch.uint8, device=DEVICE)
    shifted = room[skip : skip + expected.numel()].view(expected.shape)
    assert shifted.is_contiguous()
    with pytest.raises(LayoutError, match=f"out begins at byte {skip} of its memory: must begin at a multiple of 8"):
        prepare(layout, tensor, dims, *parts, out=shifted)
    with pytest.raises(LayoutError, match=f"prepared begins at byte {skip}"):
        unprepare(layout, tensor, shifted.copy_(expected), dims)
    aligned = room[8 : 8 + expected.numel()].view(expected.shape)
    assert torch.equal(prepare(layout, tensor, dims, *parts, out=aligned), expected)


def test_kernels_compile_for_real_cards_with_16_byte_accesses() -> None:
    """Ahead of time for three architectures, without a card: the interpreter does not see what the compiler does."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, str(TESTS / "compile_prepare.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 2 * 3 * 2 * 4
    for tensor, arch, direction, narrow, wide in lines:
        assert int(wide) > 0 and int(narrow) == 0, (tensor, arch, direction, narrow, wide)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """A w13 of more than 2^31 bytes: the last expert must be right, and the first must not be overwritten."""
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(160, 2048, 7168)
    tensor = PreparedTensor.W13_WEIGHT
    assert dims.experts * layout.expert_nbytes(tensor, dims) > 2**31
    shape = (dims.experts, *layout.source_shape(tensor, dims))
    parts = [torch.randint(1, 256, shape, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    prepared = prepare(layout, tensor, dims, *parts)
    for expert in (0, 79, 146, 159):
        assert torch.equal(prepared[expert], layout.apply(tensor, *(part[expert] for part in parts)))


@pytest.mark.gpu
def test_no_memory_beside_the_output() -> None:
    layout, dims = MoeLayout.cutedsl(gated=True), MoeDims(16, 2048, 7168)
    for tensor in PreparedTensor:
        parts = stacked_parts(layout, tensor, dims)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = prepare(layout, tensor, dims, *parts)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= out.numel() + 65536
