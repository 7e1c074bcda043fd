"""Experts that are not prepared get the name of what they are, and the advice that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nvfp4_prep import convert
from nvfp4_prep.errors import UnsupportedCheckpointError
from nvfp4_prep.formats import formats, namings
from nvfp4_prep.moe.config_fit import fit_config
from nvfp4_prep.moe.discovery import FoundLayers, LayerFinding, find_layers
from support.tensor_records import records
from support.tiny_checkpoints import Tensors, TinyLayer, config, merged, others, without, write

LAYER = TinyLayer()
CT = TinyLayer(kind="compressed-tensors")
PATH = LAYER.path
OTHER = TinyLayer("model.layers.5.mlp.experts")
EXPERTS, ROWS, HIDDEN = LAYER.experts, LAYER.intermediate, LAYER.hidden
UNKNOWN = "NVFP4 experts under unknown names"
E8M0 = torch.float8_e8m0fnu


def find(tensors: Tensors) -> FoundLayers:
    return find_layers(records(tensors), namings(), formats())


def the_refusal(tensors: Tensors) -> LayerFinding:
    """The one finding, which refuses; a whole layer beside it changes nothing of it."""
    found = find(tensors)
    assert not found.layers
    (finding,) = found.others
    assert finding.refused
    beside = find(merged([tensors, OTHER.tensors(), others()]))
    assert beside.others == (finding,)
    return finding


def renamed(*pairs: tuple[str, str], tensors: Callable[[], Tensors] = LAYER.tensors) -> Callable[[], Tensors]:
    def make() -> Tensors:
        made = tensors()
        for old, new in pairs:
            made = {name.replace(old, new): tensor for name, tensor in made.items()}
        return made

    return make


def packed_stacks(*, transposed: bool = False, letters: str = "_packed") -> Tensors:
    """As compressed-tensors spells stacks: gate_up_proj_packed, _scale and _global_scale."""
    made: Tensors = {}
    for name, rows, cols in (("gate_up_proj", 2 * ROWS, HIDDEN), ("down_proj", HIDDEN, ROWS)):
        codes = torch.zeros(EXPERTS, rows, cols // 2, dtype=torch.uint8)
        scales = torch.ones(EXPERTS, rows, cols // 16).to(torch.float8_e4m3fn)
        if transposed:
            codes, scales = codes.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()
        made |= {f"{PATH}.{name}{letters}": codes, f"{PATH}.{name}_scale": scales}
        made[f"{PATH}.{name}_global_scale"] = torch.ones(EXPERTS, 1)
    return made


def viewed(source: torch.dtype, target: torch.dtype, tensors: Tensors) -> Tensors:
    return {name: it.view(target) if it.dtype is source else it for name, it in tensors.items()}


def no_global(tensors: Tensors) -> Tensors:
    return without(tensors, lambda name: name.endswith(("_scale_2", "input_scale")))


UNKNOWN_NAMES: dict[str, tuple[Callable[[], Tensors], str]] = {
    "leaves": (renamed(("weight_scale_2", "alpha"), ("weight_scale", "scales"), (".weight", ".qweight")), PATH),
    "stacks of compressed-tensors": (packed_stacks, PATH),
    "transposed stacks": (lambda: packed_stacks(transposed=True), PATH),
    "stacks without a known projection": (renamed(("gate_up_proj", "w13_q"), tensors=packed_stacks), PATH),
    "signed codes": (lambda: viewed(torch.uint8, torch.int8, no_global(LAYER.tensors())), PATH),
    "scales as bytes": (lambda: viewed(torch.float8_e4m3fn, torch.uint8, no_global(LAYER.tensors())), PATH),
    "underscore": (renamed(("experts.", "experts_")), PATH),
    "dash": (renamed(("experts.", "experts-")), PATH),
    "slash": (renamed(("experts.", "experts/")), PATH),
    "number at once": (renamed(("experts.", "experts")), PATH),
    "singular": (renamed(("experts.", "expert.")), "model.layers.0.mlp.expert"),
    "prefixed word": (renamed(("experts.", "local_experts.")), "model.layers.0.mlp.local_experts"),
    "leading zeros": (renamed(("experts.", "experts.0")), PATH),
    "other projections": (renamed(("gate_proj", "wg"), ("up_proj", "wu"), ("down_proj", "wd")), PATH),
    "unknown projections before the number": (
        lambda: {
            ".".join([PATH, f"linear_{name.split('.')[6]}", name.split(".")[5], name.split(".")[7]]): tensor
            for name, tensor in LAYER.tensors().items()
        },
        PATH,
    ),
}


@pytest.mark.parametrize("case", UNKNOWN_NAMES)
def test_nvfp4_under_unknown_names_is_nvfp4_under_unknown_names(case: str) -> None:
    make, path = UNKNOWN_NAMES[case]
    finding = the_refusal(make())
    assert (finding.kind, finding.experts_path) == ("unknown names", path)
    assert UNKNOWN in finding.reason
    assert "docs/adding-a-format.md" in finding.instead
    assert "MXFP" not in finding.reason


@pytest.mark.parametrize(
    "name",
    [
        "shared_experts.0.gate_proj",
        "shared_expert.gate_proj",
        "share_expert.up",
        "residual_expert.gate_proj",
        "residual_expert.w1",
    ],
)
def test_linear_layers_that_are_no_routed_experts_pass(name: str) -> None:
    codes = torch.zeros(ROWS, HIDDEN // 2, dtype=torch.uint8)
    linear = {f"model.layers.0.mlp.{name}.weight": codes}
    linear |= {f"model.layers.0.mlp.{name}.weight_scale": torch.ones(ROWS, HIDDEN // 16).to(torch.float8_e4m3fn)}
    assert find(linear).others == ()


def per_expert(**leaves: torch.Tensor) -> Tensors:
    return {
        f"{PATH}.{expert}.{name}.{leaf}": tensor
        for expert in range(EXPERTS)
        for name in LAYER.names
        for leaf, tensor in leaves.items()
    }


def fp8(rows: int, cols: int) -> torch.Tensor:
    return torch.ones(rows, cols).to(torch.float8_e4m3fn)


def byte(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.uint8)


PASSED: dict[str, tuple[Tensors, str]] = {
    "fp8 with blocks of 128 and e8m0 scales": (per_expert(weight=fp8(256, 256), scale=byte(2, 2).view(E8M0)), "FP8"),
    "fp8 with block scales": (per_expert(weight=fp8(256, 256), weight_scale_inv=torch.ones(2, 2)), "FP8"),
    "mxfp8 with e8m0 scales": (per_expert(weight=fp8(64, 64), weight_scale=byte(64, 2).view(E8M0)), "MXFP8"),
    "mxfp4, byte scales": (per_expert(weight=byte(64, 32), weight_scale=byte(64, 2)), "MXFP4"),
    "mxfp4 with known leaves": (per_expert(weight_packed=byte(64, 32), weight_scale=byte(64, 2)), "MXFP4"),
    "gpt-oss": (
        {f"{PATH}.down_proj_blocks": byte(EXPERTS, 64, 2, 16), f"{PATH}.down_proj_scales": byte(EXPERTS, 64, 2)},
        "MXFP4",
    ),
    "bitsandbytes": (
        per_expert(**{"weight": byte(2048, 1), "weight.absmax": torch.ones(64), "weight.quant_map": torch.ones(16)}),
        "bitsandbytes",
    ),
    "int4 packed": (
        per_expert(
            weight_packed=torch.ones(64, 8, dtype=torch.int32),
            weight_scale=torch.ones(64, 2, dtype=torch.bfloat16),
            weight_shape=torch.ones(2, dtype=torch.int32),
        ),
        "integers",
    ),
    "int8": (per_expert(weight=byte(64, 64).view(torch.int8), weight_scale=torch.ones(64, 1)), "integers"),
}


@pytest.mark.parametrize("case", PASSED)
def test_other_kinds_pass_by_their_names(case: str) -> None:
    tensors, word = PASSED[case]
    (finding,) = find(merged([tensors, OTHER.tensors()])).others
    assert not finding.refused
    assert finding.reason.startswith(("experts are " + word, "experts are quantized")) and word in finding.reason


def replaced(layer: TinyLayer, prefix: str, **leaves: torch.Tensor) -> Tensors:
    """The layer, one part of it of another kind."""
    made = without(layer.tensors(), lambda name: prefix in name)
    for name in layer.tensors():
        stem = name.rpartition(".")[0]
        if prefix in name:
            made |= {f"{stem}.{leaf}": tensor.clone() for leaf, tensor in leaves.items()}
    return made


BF16 = torch.ones(ROWS, HIDDEN, dtype=torch.bfloat16)
SCALAR = torch.ones(())
MIXED: dict[str, tuple[Tensors, str]] = {
    "fp8 down": (
        replaced(LAYER, "down_proj", weight=fp8(HIDDEN, ROWS), weight_scale=SCALAR, input_scale=SCALAR),
        "FP8 in 3 of 9",
    ),
    "fp8 down, block scales": (
        replaced(LAYER, "down_proj", weight=fp8(256, 256), weight_scale_inv=torch.ones(2, 2)),
        "FP8",
    ),
    "fp8 down, compressed-tensors": (
        replaced(CT, "down_proj", weight=fp8(HIDDEN, ROWS), weight_scale=SCALAR),
        "FP8 in 3 of 9",
    ),
    "mxfp8 down": (
        replaced(LAYER, "down_proj", weight=fp8(HIDDEN, ROWS), weight_scale=byte(HIDDEN, ROWS // 32)),
        "MXFP8",
    ),
    "mxfp4 down": (
        replaced(LAYER, "down_proj", weight=byte(HIDDEN, ROWS // 2), weight_scale=byte(HIDDEN, ROWS // 32)),
        "MXFP4",
    ),
    "int4 down": (
        replaced(CT, "down_proj", weight_packed=torch.ones(HIDDEN, 8, dtype=torch.int32)),
        "quantized to integers",
    ),
    "one expert bf16": (replaced(LAYER, ".experts.1.", weight=BF16), "bf16 in 3 of 9"),
    "one expert bf16, compressed-tensors": (replaced(CT, ".experts.1.", weight=BF16), "bf16 in 3 of 9"),
    "the last expert bf16": (replaced(LAYER, ".experts.2.", weight=BF16), f"{PATH}.2.gate_proj.weight"),
    "two formats": (
        without(LAYER.tensors(), lambda name: ".experts.1." in name)
        | without(CT.tensors(), lambda name: ".experts.1." not in name),
        "NVFP4 as compressed-tensors stores it in 3 of 9",
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_a_layer_of_several_kinds_is_refused_as_mixed(case: str) -> None:
    tensors, words = MIXED[case]
    finding = the_refusal(tensors)
    assert (finding.kind, finding.experts_path) == ("mixed", PATH)
    assert "mix NVFP4 and other kinds" in finding.reason
    assert words in finding.reason
    assert "missing" not in finding.reason
    assert "download" not in finding.instead


def fused_expert(expert: int) -> Tensors:
    """One expert with gate and up in one tensor."""
    made = {}
    for name, tensor in LAYER.tensors().items():
        if f".experts.{expert}." in name and "gate_proj" in name:
            both = torch.cat([tensor.view(torch.uint8)] * 2).view(tensor.dtype) if tensor.dim() else tensor
            made[name.replace("gate_proj", "gate_up_proj")] = both
    return made


def test_one_expert_under_an_unknown_name_is_no_missing_expert() -> None:
    made = {name.replace(".experts.1.", ".experts-1."): tensor for name, tensor in LAYER.tensors().items()}
    found = find(made)
    assert not found.layers
    assert [finding.kind for finding in found.others] == ["unknown names", "ambiguous"]
    assert f"{PATH}.0.gate_proj.weight and {PATH}-1.gate_proj.weight" in found.others[1].reason


@pytest.mark.parametrize(("size", "fits"), [(1, True), (2, True), (3, False), (0, False)])
def test_scales_of_a_fused_tensor_are_one_or_one_for_each_projection(size: int, fits: bool) -> None:
    made = without(LAYER.tensors(), lambda name: "gate_proj" in name or "up_proj" in name)
    for expert in range(EXPERTS):
        made |= fused_expert(expert) | {f"{PATH}.{expert}.gate_up_proj.input_scale": torch.ones(size)}
    found = find(made)
    assert bool(found.layers) == fits
    assert [finding.kind for finding in found.others] == ([] if fits else ["scalar"])


@pytest.mark.parametrize("alternating", [True, False, None])
def test_rows_of_a_fused_expert_alternate_where_the_activation_says_so(alternating: bool | None) -> None:
    made = without(LAYER.tensors(), lambda name: "gate_proj" in name or "up_proj" in name)
    for expert in range(EXPERTS):
        made |= fused_expert(expert)
    found = find_layers(records(made), namings(), formats(), alternating=alternating)
    assert [finding.kind for finding in found.refused] == (["row order"] if alternating is None else [])
    assert [layer.groups[0].alternating for layer in found.layers] == ([] if alternating is None else [alternating])


def of_expert(expert: int, tensors: Tensors) -> Tensors:
    return {name: it for name, it in tensors.items() if f".{expert}." in name.removeprefix("model.layers.0.")}


PROJECTION_FIRST = {
    ".".join([*(parts := name.split("."))[:5], parts[6], parts[5], parts[7]]): it
    for name, it in LAYER.tensors().items()
}
SPELLED_TWICE = {
    "projection first in one expert": without(LAYER.tensors(), lambda name: ".experts.1." in name)
    | of_expert(1, PROJECTION_FIRST),
    "projection first in the last expert": without(LAYER.tensors(), lambda name: ".experts.2." in name)
    | of_expert(2, PROJECTION_FIRST),
    "fused in one expert": without(
        LAYER.tensors(), lambda name: ".experts.1." in name and ("gate" in name or "up" in name)
    )
    | fused_expert(1),
    "fused beside apart": LAYER.tensors() | fused_expert(1),
    "down as a stack": without(LAYER.tensors(), lambda name: "down_proj" in name)
    | {name: it for name, it in LAYER.llama4().items() if "down_proj" in name},
}


@pytest.mark.parametrize("case", SPELLED_TWICE)
def test_two_spellings_in_a_layer_are_said_to_be_two_spellings(case: str) -> None:
    found = find(SPELLED_TWICE[case])
    assert found.refused
    assert {finding.kind for finding in found.refused} == {"ambiguous"}
    assert all("missing" not in finding.reason for finding in found.refused)


def test_experts_of_another_kind_under_other_names_do_not_pass_beside_a_whole_layer() -> None:
    stack = {f"{PATH}.down_proj": torch.ones(EXPERTS, HIDDEN, ROWS, dtype=torch.bfloat16)}
    (finding,) = find(LAYER.tensors() | stack).refused
    assert finding.kind == "mixed"
    assert "experts are there twice: NVFP4, and under other names bf16" in finding.reason


def test_an_expert_that_was_not_calibrated() -> None:
    made = without(LAYER.tensors(), lambda name: ".experts.1." in name and name.endswith("input_scale"))
    finding = the_refusal(made)
    assert f"3 expert tensors are missing: {PATH}.1.gate_proj.input_scale" in finding.reason
    assert "calibrate with more tokens" in finding.instead


QUARK = renamed((".input_scale", ".input_scale_2"))
QUARK_CONFIG = {"quant_method": "quark", "global_quant_config": {}}


def test_quark_is_refused_by_its_name() -> None:
    finding = the_refusal(QUARK())
    assert finding.kind == "quark"
    assert "AMD Quark NVFP4" in finding.reason


@pytest.mark.parametrize("nested", [False, True])
def test_quark_is_known_by_the_config_too(nested: bool) -> None:
    """The server goes by quant_method: it would not find prepared experts there, whatever their leaves were called."""
    said = {"quantization_config": QUARK_CONFIG}
    found = fit_config(find(LAYER.tensors()), {"text_config": said} if nested else said)
    assert [finding.kind for finding in found.refused] == ["quark"]
    assert not found.layers


@pytest.mark.parametrize(
    ("make", "words"),
    [(QUARK, "AMD Quark"), (packed_stacks, UNKNOWN), (lambda: MIXED["fp8 down"][0], "mix NVFP4")],
    ids=["quark", "unknown", "mixed"],
)
def test_convert_refuses_before_it_writes(tmp_path: Path, make: Callable[[], Tensors], words: str) -> None:
    source = write(tmp_path / "source", merged([make(), others()]), config())
    with pytest.raises(UnsupportedCheckpointError, match=words) as caught:
        convert(source, tmp_path / "out")
    assert "download" not in str(caught.value)
    assert not (tmp_path / "out").exists()
