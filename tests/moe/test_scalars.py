"""Scalars of a layer: order of float operations, maxima over the layer, broken values, few reads."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from nvfp4_prep.checkpoint.index import read_index
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.errors import UnsupportedCheckpointError
from nvfp4_prep.moe.config_fit import classify_layers
from nvfp4_prep.moe.scalar_reader import read_scalars
from nvfp4_prep.moe.scalars import LayerScalars, expert_scale_vectors
from nvfp4_prep.options import GateUpPolicy
from nvfp4_prep_kernels import MoeLayout
from support.tiny_checkpoints import Tensors, TinyLayer, config, merged, write

LAYER = TinyLayer(differing=True)
PATH = LAYER.path


def scalars(folder: Path, tensors: Tensors, **changes: object) -> list[LayerScalars]:
    source = LocalSource(write(folder, tensors, config(**changes), shards=3))
    try:
        return read_scalars(source, classify_layers(read_index(source)).layers)
    finally:
        source.close()


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def test_modelopt(tmp_path: Path) -> None:
    (found,) = scalars(tmp_path, LAYER.tensors())
    for expert in range(3):
        assert found.gate_scale_2 is not None
        assert found.gate_scale_2[expert] == float32(LAYER.leaves(expert, "gate_proj")[2])
        assert found.up_scale_2[expert] == float32(LAYER.leaves(expert, "up_proj")[2])
        assert found.w2_scale_2[expert] == float32(LAYER.leaves(expert, "down_proj")[2])
    inputs = [float32(LAYER.leaves(expert, name)[3]) for expert in range(3) for name in ("gate_proj", "up_proj")]
    assert found.w13_input_scale == max(inputs)
    assert found.w2_input_scale == max(float32(LAYER.leaves(expert, "down_proj")[3]) for expert in range(3))
    assert found.differing == (0, 1, 2)


def test_reciprocals_are_inverted_before_the_maximum_is_taken(tmp_path: Path) -> None:
    tensors = TinyLayer(kind="compressed-tensors").tensors()
    (found,) = scalars(tmp_path, tensors)
    stored = [tensors[f"{PATH}.{e}.{name}.input_global_scale"] for e in range(3) for name in ("gate_proj", "up_proj")]
    assert found.w13_input_scale == float((1.0 / torch.stack(stored)).max())
    assert found.up_scale_2[1] == float(1.0 / tensors[f"{PATH}.1.up_proj.weight_global_scale"])
    assert found.raw[f"{PATH}.up_proj.weight_global_scale"] == b"".join(
        struct.pack("<f", float(tensors[f"{PATH}.{e}.up_proj.weight_global_scale"])) for e in range(3)
    )


def test_one_scalar_for_all_experts(tmp_path: Path) -> None:
    (found,) = scalars(tmp_path, LAYER.llama4())
    assert found.gate_scale_2 == found.up_scale_2 == (float32(LAYER.leaves(0, "gate_proj")[2]),) * 3
    assert found.differing == ()
    assert len(found.raw[f"{PATH}.gate_up_proj_weight_scale_2"]) == 4


def test_step_stacks_with_one_scalar_or_one_each(tmp_path: Path) -> None:
    made = {name.replace(".experts.", ".moe."): tensor for name, tensor in LAYER.step().items()}
    (each,) = scalars(tmp_path / "each", made)
    assert each.w2_scale_2 == tuple(float32(LAYER.leaves(expert, "down_proj")[2]) for expert in range(3))
    name = "model.layers.0.mlp.moe.down_proj.weight_scale_2"
    (shared,) = scalars(tmp_path / "shared", made | {name: torch.tensor(0.5)})
    assert shared.w2_scale_2 == (0.5,) * 3


def test_experts_without_gate(tmp_path: Path) -> None:
    layer = TinyLayer(names=("up_proj", "down_proj"))
    (found,) = scalars(tmp_path, layer.tensors(), hidden_act="relu2")
    assert found.gate_scale_2 is None
    assert found.differing == ()
    assert found.w13_input_scale == max(float32(layer.leaves(expert, "up_proj")[3]) for expert in range(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
def test_broken_values_are_refused_and_named(tmp_path: Path, value: float, leaf: str) -> None:
    tensors = LAYER.tensors() | {f"{PATH}.1.up_proj.{leaf}": torch.tensor(value)}
    with pytest.raises(UnsupportedCheckpointError, match="of the up projection of expert 1 is not a usable scale"):
        scalars(tmp_path, tensors)


def test_a_reciprocal_of_zero_is_refused(tmp_path: Path) -> None:
    tensors = TinyLayer(kind="compressed-tensors").tensors()
    tensors[f"{PATH}.2.down_proj.weight_global_scale"] = torch.zeros(1)
    with pytest.raises(UnsupportedCheckpointError, match="down projection of expert 2 is not a usable scale"):
        scalars(tmp_path, tensors)


def test_uncalibrated_experts(tmp_path: Path) -> None:
    """One expert that no token reached has input scale 0: the maximum still serves. All of them: refused."""
    tensors = LAYER.tensors()
    tensors[f"{PATH}.1.up_proj.input_scale"] = torch.tensor(0.0)
    (found,) = scalars(tmp_path / "one", tensors)
    assert found.w13_input_scale > 0
    for expert in range(3):
        tensors[f"{PATH}.{expert}.down_proj.input_scale"] = torch.tensor(0.0)
    with pytest.raises(UnsupportedCheckpointError, match="all input scales of the down projections are 0"):
        scalars(tmp_path / "all", tensors)


def test_all_layers_are_read_in_their_order(tmp_path: Path) -> None:
    layers = [TinyLayer(f"model.layers.{number}.mlp.experts", experts=number + 1) for number in range(3)]
    found = scalars(tmp_path, merged(layer.tensors() for layer in reversed(layers)))
    assert [len(item.up_scale_2) for item in found] == [1, 2, 3]


def test_vectors_take_the_common_scale(tmp_path: Path) -> None:
    source = LocalSource(write(tmp_path, LAYER.tensors()))
    (layer,) = classify_layers(read_index(source)).layers
    (found,) = read_scalars(source, [layer])
    layout = MoeLayout.cutedsl(gated=True)
    vectors = expert_scale_vectors(layer, layout, GateUpPolicy.RECONCILE, found, {0: "gate", 2: "up"})
    assert found.gate_scale_2 is not None
    expected = (found.up_scale_2[0], found.gate_scale_2[1], found.gate_scale_2[2])
    assert struct.unpack("<3f", vectors[f"{PATH}.routed_experts.w13_weight_scale_2"]) == expected
    assert struct.unpack("<3f", vectors[f"{PATH}.routed_experts.w2_input_scale"]) == (found.w2_input_scale,) * 3
    source.close()
