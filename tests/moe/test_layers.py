"""Source arrangements to canonical matrices and back: all arrangements of one layer are the same layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_prep.checkpoint.index import read_index
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.formats import Leaf
from nvfp4_prep.moe.config_fit import classify_layers
from nvfp4_prep.moe.layers import MoeLayer, TensorGroup
from nvfp4_prep_kernels import MoeLayout, PreparedTensor, Projection
from nvfp4_prep_kernels.gate_up import join_alternating_rows
from support.tiny_checkpoints import Tensors, TinyLayer, config, write

LAYER = TinyLayer(experts=2, intermediate=64, hidden=256)


def alternating() -> Tensors:
    """Stacks as gpt-oss has them: transposed, gate and up alternating along the last dimension."""
    made = LAYER.llama4()
    for name in [name for name in made if "gate_up_proj" in name and made[name].dim() == 3]:
        bytes_ = made[name].view(torch.uint8).transpose(1, 2)
        gate, up = bytes_.chunk(2, dim=1)
        joined = join_alternating_rows(gate, up).transpose(1, 2).contiguous()
        made[name] = joined.view(made[name].dtype)
    return made


ARRANGEMENTS = {
    "modelopt": (LAYER.tensors(), {}),
    "compressed-tensors": (TinyLayer(experts=2, hidden=256, kind="compressed-tensors").tensors(), {}),
    "llama4": (LAYER.llama4(), {}),
    "step": ({name.replace(".experts.", ".moe."): tensor for name, tensor in LAYER.step().items()}, {}),
    "alternating": (alternating(), {"model_type": "gpt_oss"}),
}


def opened(folder: Path, arrangement: str) -> tuple[LocalSource, MoeLayer]:
    tensors, changes = ARRANGEMENTS[arrangement]
    source = LocalSource(write(folder, tensors, config(**changes), shards=2))
    (layer,) = classify_layers(read_index(source)).layers
    return source, layer


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_arrangement_gives_the_same_canonical_matrices(tmp_path: Path, arrangement: str) -> None:
    source, layer = opened(tmp_path, arrangement)
    layout = MoeLayout.cutedsl(gated=True)
    for tensor in PreparedTensor:
        groups = layer.groups_for(layout, tensor)
        for expert in range(2):
            parts = []
            for group in groups:
                place = group.expert_range(expert, 2)
                raw = torch.frombuffer(
                    bytearray(source.peek(place.file, place.offset_bytes, place.nbytes)), dtype=torch.uint8
                )
                arranged = group.arrange(raw)
                assert torch.equal(group.disarrange(arranged), raw)
                parts += arranged
            for projection, part in zip(layout.projections(tensor), parts, strict=True):
                expected = LAYER.leaves(expert, f"{projection}_proj")[1 if tensor.is_scale else 0]
                assert torch.equal(part, expected.view(torch.uint8))
    source.close()


def test_groups_of_keeps_the_order_and_counts_a_fused_group_once(tmp_path: Path) -> None:
    source, layer = opened(tmp_path, "llama4")
    for wanted in ((Projection.GATE, Projection.UP), (Projection.UP,), (Projection.UP, Projection.GATE)):
        (group,) = layer.groups_of(Leaf.CODES, wanted)
        assert group.projections == (Projection.GATE, Projection.UP)
    source.close()
    source, layer = opened(tmp_path / "b", "modelopt")
    found = layer.groups_of(Leaf.CODES, (Projection.UP, Projection.GATE))
    assert [group.projections for group in found] == [(Projection.UP,), (Projection.GATE,)]
    source.close()


def test_sizes_and_shards(tmp_path: Path) -> None:
    source, layer = opened(tmp_path, "modelopt")
    assert layer.source_nbytes == sum(tensor.nbytes for tensor in ARRANGEMENTS["modelopt"][0].values())
    assert layer.shards == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    source.close()


def test_shared_scalars_and_keys() -> None:
    shared = TensorGroup("e.gate_up_proj_input_scale", "", Leaf.INPUT_SCALE, (Projection.UP,), "F32", (), stacked=True)
    own = TensorGroup("e.up_proj.input_scale", "", Leaf.INPUT_SCALE, (Projection.UP,), "F32", (8,), stacked=True)
    each = TensorGroup("e.", ".up_proj.input_scale", Leaf.INPUT_SCALE, (Projection.UP,), "F32", ())
    assert shared.shared_scalar and not own.shared_scalar and not each.shared_scalar
    assert (shared.key, each.key, each.name(7)) == (
        "e.gate_up_proj_input_scale",
        "e.up_proj.input_scale",
        "e.7.up_proj.input_scale",
    )
