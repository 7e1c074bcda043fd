"""Which layers are prepared, which pass through and which are refused, and what the user is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_prep.errors import SourceError
from nvfp4_prep.formats import formats, namings
from nvfp4_prep.moe.discovery import FoundLayers, find_layers
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep_kernels import MoeDims, Projection
from support.tensor_records import DTYPES, records
from support.tiny_checkpoints import Tensors, TinyLayer, merged, others, without

LAYER = TinyLayer()
PATH = LAYER.path


def find(tensors: Tensors, alternating: bool | None = False) -> FoundLayers:
    return find_layers(records(tensors), namings(), formats(), alternating=alternating)


def the_layer(tensors: Tensors) -> MoeLayer:
    found = find(tensors)
    assert not found.others
    (layer,) = found.layers
    return layer


def refusal(tensors: Tensors) -> str:
    found = find(tensors)
    assert not found.layers
    (finding,) = found.refused
    assert finding.experts_path == PATH
    assert finding.instead
    return finding.reason


PREFIXES = [
    "language_model.model.layers.1.mlp.experts",
    "language_model.layers.1.mlp.experts",
    "model.layers.3.mlp.experts",
    "layers.0.ffn.experts",
    "model.language_model.layers.0.mlp.experts",
    "model.layers.0.block_sparse_moe.experts",
    "language_model.model.layers.3.block_sparse_moe.experts",
    "backbone.layers.1.mixer.experts",
    "layers.0.experts",
    "model.layers.3.moe.experts",
    "experts",
]


@pytest.mark.parametrize("path", PREFIXES)
@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("up_proj", "down_proj")])
def test_every_per_expert_spelling(path: str, kind: str, names: tuple[str, ...]) -> None:
    layer = the_layer(merged([TinyLayer(path, kind=kind, names=names).tensors(), others()]))
    assert layer.experts_path == path
    assert layer.dims == MoeDims(3, 64, 128)
    assert layer.gated == (len(names) == 3)
    assert (layer.format, layer.naming) == (kind, "per-expert")
    assert layer.prepared_name("w13_weight") == f"{path}.routed_experts.w13_weight"
    made = TinyLayer(path, kind=kind, names=names).tensors()
    assert {group.name(expert) for group in layer.groups for expert in range(3)} == made.keys()


def test_layer_numbers_order_the_layers() -> None:
    paths = [f"model.layers.{number}.mlp.experts" for number in (10, 2, 1)]
    found = find(merged(TinyLayer(path).tensors() for path in paths))
    assert [layer.index for layer in found.layers] == [1, 2, 10]


def test_llama4_stacks() -> None:
    path = "model.layers.1.feed_forward.experts"
    layer = the_layer(merged([TinyLayer(path).llama4(), others(1)]))
    assert (layer.experts_path, layer.dims, layer.naming) == (path, MoeDims(3, 64, 128), "stacked")
    assert all(group.stacked and not group.alternating for group in layer.groups)
    assert all(group.transposed for group in layer.groups if not group.leaf.is_scalar)
    assert layer.groups[0].projections == (Projection.GATE, Projection.UP)


def test_step_stacks() -> None:
    made = {f"model.layers.3.moe.{name}": tensor for name, tensor in _step().items()}
    layer = the_layer(made | {"model.layers.3.moe.gate.weight": torch.ones(3, 8)})
    assert (layer.experts_path, layer.dims, layer.naming) == (
        "model.layers.3.moe.experts",
        MoeDims(3, 64, 128),
        "moe-stack",
    )
    assert not any(group.transposed for group in layer.groups)
    assert {group.name(0) for group in layer.groups} == made.keys()


def _step() -> Tensors:
    return {name.removeprefix(f"{PATH}."): tensor for name, tensor in LAYER.step().items()}


def test_a_stack_that_is_not_transposed_is_seen_by_its_shapes() -> None:
    made = {}
    for name, tensor in TinyLayer(PATH).llama4().items():
        made[name] = tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor
    layer = the_layer(made)
    assert layer.dims == MoeDims(3, 64, 128)
    assert not any(group.transposed for group in layer.groups)


def test_fused_rows_of_an_unknown_swigluoai_model_are_refused() -> None:
    assert find(LAYER.llama4(), alternating=True).layers[0].groups[0].alternating
    assert find(LAYER.tensors(), alternating=None).layers  # separate tensors have no row order to be wrong about
    (finding,) = find(LAYER.llama4(), alternating=None).refused
    assert "rows may alternate" in finding.reason


def as_weight(dtype: torch.dtype, **scales: torch.Tensor) -> Callable[[], Tensors]:
    def make() -> Tensors:
        made = {}
        for expert in range(2):
            for name in LAYER.names:
                made[f"{PATH}.{expert}.{name}.weight"] = torch.zeros(16, 32).to(dtype)
                made |= {f"{PATH}.{expert}.{name}.{leaf}": scale for leaf, scale in scales.items()}
        return made

    return make


OTHER_KINDS = {
    "bf16": (as_weight(torch.bfloat16), "bf16"),
    "fp32": (as_weight(torch.float32), "fp32"),
    "fp8 with block scales": (as_weight(torch.float8_e4m3fn, weight_scale_inv=torch.ones(1, 1)), "FP8"),
    "fp8 per tensor": (as_weight(torch.float8_e4m3fn, weight_scale=torch.ones(()), input_scale=torch.ones(())), "FP8"),
    "mxfp8": (as_weight(torch.float8_e4m3fn, weight_scale=torch.ones(16, 1, dtype=torch.uint8)), "MXFP8"),
    "mxfp4": (as_weight(torch.uint8, weight_scale=torch.ones(16, 2, dtype=torch.uint8)), "MXFP4"),
    "mxfp4 of DeepSeek-V4": (as_weight(torch.int8, scale=torch.ones(16, 2).to(torch.float8_e8m0fnu)), "MXFP4"),
    "int4": (as_weight(torch.int32, weight_scale=torch.ones(16, 1, dtype=torch.bfloat16)), "integers"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_experts_of_other_kinds_pass_through(kind: str) -> None:
    """Beside an NVFP4 layer: mixed precision, and MTP layers that match the names."""
    make, reason = OTHER_KINDS[kind]
    found = find(merged([make(), TinyLayer("model.layers.5.mlp.experts").tensors()]))
    assert [layer.index for layer in found.layers] == [5]
    (finding,) = found.passed
    assert finding.experts_path == PATH
    assert reason in finding.reason


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
def test_weight_only_nvfp4_passes_through(kind: str) -> None:
    made = without(replace(LAYER, kind=kind).tensors(), lambda name: "input" in name)
    (finding,) = find(made).passed
    assert finding.kind == "w4a16"
    assert "no input scales" in finding.reason


def test_gpt_oss_biases_are_refused() -> None:
    made = LAYER.llama4() | {f"{PATH}.down_proj_bias": torch.ones(3, 128, dtype=torch.bfloat16)}
    assert f"experts have biases ({PATH}.down_proj_bias)" in refusal(made)


def test_a_path_with_the_word_bias_is_no_bias() -> None:
    made = LAYER.tensors() | {f"{PATH}.0.gate_proj.pre_quant_scale": torch.ones(8)}
    assert "no place in the prepared layout" in refusal(made)
    unbiased = TinyLayer("debias.layers.0.experts")
    assert the_layer(unbiased.tensors())


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_scale_2", "input_scale"])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_with_a_missing_tensor_is_named(leaf: str, name: str) -> None:
    missing = f"{PATH}.1.{name}.{leaf}"
    assert missing in refusal(without(LAYER.tensors(), lambda tensor: tensor == missing))


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "weight_scale_2"])
def test_a_leaf_that_no_expert_has_is_named(leaf: str) -> None:
    reason = refusal(without(LAYER.tensors(), lambda name: name.endswith(f".{leaf}")))
    assert f"gate projection's {leaf} of every expert" in reason


def test_gate_without_up_and_missing_down() -> None:
    assert "up projection's" in refusal(without(LAYER.tensors(), lambda name: ".up_proj." in name))
    assert "down projection's" in refusal(without(LAYER.tensors(), lambda name: ".down_proj." in name))
    assert "input_scale of every expert" in refusal(
        without(LAYER.tensors(), lambda name: name.endswith("gate_proj.input_scale"))
    )


@pytest.mark.parametrize("gone", [0, 1])
def test_experts_not_numbered_from_zero_without_gaps(gone: int) -> None:
    reason = refusal(without(LAYER.tensors(), lambda name: f".experts.{gone}." in name))
    assert f"not numbered 0 to 2: {gone} missing" in reason


def test_an_absurd_expert_number_is_not_counted_up_to() -> None:
    made = LAYER.tensors()
    made[f"{PATH}.999999.up_proj.weight"] = made[f"{PATH}.0.up_proj.weight"]
    assert "not numbered 0 to 999999" in refusal(made)


def test_different_shapes() -> None:
    made = LAYER.tensors()
    made[f"{PATH}.2.up_proj.weight"] = torch.ones(32, 64, dtype=torch.uint8)
    assert f"{PATH}.2.up_proj.weight is U8 [32, 64]" in refusal(made)
    for leaf in ("weight", "weight_scale"):
        made = LAYER.tensors()
        for expert in range(3):
            name = f"{PATH}.{expert}.up_proj.{leaf}"
            made[name] = made[name][:32]
        assert "32 x 128 matrix" in refusal(made)


def test_wrong_dtypes() -> None:
    made = LAYER.tensors()
    made[f"{PATH}.1.up_proj.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)
    assert "BF16" in refusal(made)
    made = {
        name: tensor.view(torch.uint8) if name.endswith("weight_scale") else tensor
        for name, tensor in LAYER.tensors().items()
    }
    assert "weight_scale is U8, NVFP4 has F8_E4M3" in refusal(made)
    made = {
        name: tensor.to(torch.bfloat16) if name.endswith("weight_scale_2") else tensor
        for name, tensor in LAYER.tensors().items()
    }
    assert "weight_scale_2 is BF16 []" in refusal(made)
    made = {name: torch.ones(2) if name.endswith("input_scale") else tensor for name, tensor in LAYER.tensors().items()}
    assert "input_scale is F32 [2]" in refusal(made)
    stacked = LAYER.llama4() | {f"{PATH}.down_proj_input_scale": torch.ones(2)}
    assert "down_proj_input_scale is F32 [2]" in refusal(stacked)


def test_wrong_ranks() -> None:
    made = {name: tensor.flatten() if name.endswith(".weight") else tensor for name, tensor in LAYER.tensors().items()}
    assert "has shape [" in refusal(made)
    stacked = LAYER.llama4()
    stacked[f"{PATH}.gate_up_proj"] = stacked[f"{PATH}.gate_up_proj"][:, :8].contiguous()
    assert "do not fit each other" in refusal(stacked)


def test_two_spellings_in_one_layer_are_refused() -> None:
    """Names would not come back: restore needs one rule for all experts."""
    spelled = TinyLayer(names=("w1", "w3", "w2")).tensors()
    mixed = {name: tensor for name, tensor in LAYER.tensors().items() if ".experts.0." in name}
    mixed |= {name: tensor for name, tensor in spelled.items() if ".experts.0." not in name}
    assert "spelled differently" in refusal(mixed)
    assert "spelled differently" in refusal(LAYER.tensors() | spelled)


def test_two_formats_and_stacks_beside_experts_are_refused() -> None:
    both = LAYER.tensors() | TinyLayer(kind="compressed-tensors").tensors()
    assert "no place in the prepared layout" in refusal(both)
    found = find(LAYER.tensors() | LAYER.llama4())
    assert len(found.layers) == 1
    assert "experts are there twice" in found.refused[0].reason


def test_no_experts() -> None:
    found = find(others())
    assert found.layers == found.others == ()


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_anything_dropped_renamed_or_reshaped_is_never_prepared_wrongly(data: st.DataObject) -> None:
    """A damaged layer is refused or passes; if it is prepared, each of its tensors exists and all names come back."""
    make = data.draw(st.sampled_from([TinyLayer(experts=2).tensors, TinyLayer(experts=2).llama4]))
    made = make()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(made)))
        tensor = made.pop(name)
        action = data.draw(st.sampled_from(["drop", "rename", "reshape", "dtype"]))
        if action == "rename":
            made[name.replace(*data.draw(st.sampled_from([("up", "gate"), (".0.", ".1."), ("weight", "bias")])))] = (
                tensor
            )
        elif action == "reshape":
            made[name] = tensor.unsqueeze(0) if tensor.dim() < 2 else tensor.transpose(-1, -2).contiguous()
        elif action == "dtype":
            made[name] = torch.zeros(tensor.shape, dtype=data.draw(st.sampled_from(list(DTYPES))))
    try:
        index = records(made)
    except SourceError:
        return
    for layer in find_layers(index, namings(), formats()).layers:
        names = {group.name(expert) for group in layer.groups for expert in range(layer.dims.experts)}
        assert names == {record.name for group in layer.groups for record in group.records}
        for group in layer.groups:
            for spec in group.specs(layer.dims.experts):
                assert (index[spec.name].dtype, index[spec.name].shape) == (spec.dtype, spec.shape)
