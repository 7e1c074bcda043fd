"""Quantization configs that contradict the experts' tensors: refused by name, or a warning in every output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep import inspect, plan
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import UnsupportedCheckpointError
from support.tiny_checkpoints import TinyLayer, config, merged, others, write

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
KINDS = ("modelopt", "compressed-tensors")


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **more}


def groups(weights: object = NVFP4, inputs: object = NVFP4, targets: tuple[str, ...] = ("Linear",)) -> dict[str, Any]:
    return {"group_0": {"weights": weights, "input_activations": inputs, "targets": list(targets)}}


def compressed(**more: Any) -> dict[str, Any]:
    made = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": groups()}
    return made | more


def transform(location: str, *targets: str) -> dict[str, Any]:
    apply = [{"location": location, "targets": list(targets)}]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": apply}}}


ATTENTION = {"weights": NVFP4, "input_activations": NVFP4, "targets": ["LlamaAttention"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "MXFP8": (modelopt("MXFP8"), "says quant_algo MXFP8"),
    "lower case": (modelopt("fp8"), "says quant_algo FP8"),
    "AWQ": (modelopt("NVFP4_AWQ"), "says quant_algo NVFP4_AWQ"),
    "W4A8": (modelopt("W4A8_NVFP4_FP8"), "says quant_algo W4A8_NVFP4_FP8"),
    "W4A16": (modelopt("W4A16_NVFP4"), "says quant_algo W4A16_NVFP4"),
    "nested": ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "says quant_algo FP8"),
    "no method": ({"quant_algo": "FP8"}, "says quant_algo FP8"),
    "weights only": (modelopt("NVFP4", config_groups=groups(inputs=None)), "weight-only NVFP4"),
    "mixed without NVFP4": (
        modelopt("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8"}}),
        "MIXED_PRECISION of 'FP8'",
    ),
    "compressed weights only": (compressed(config_groups=groups(inputs=None)), "weight-only NVFP4"),
    "compressed_tensors": (
        compressed(quant_method="Compressed_Tensors", config_groups=groups(inputs=None)),
        "weight-only NVFP4",
    ),
    "weights only beside attention": (
        compressed(config_groups={"a": ATTENTION, **groups(inputs=None)}),
        "weight-only NVFP4",
    ),
    "FP8 weights": (compressed(config_groups=groups(FP8, FP8)), "no config group of 4-bit float weights"),
    "MXFP4 weights": (compressed(config_groups=groups({**NVFP4, "group_size": 32})), "no config group of 4-bit"),
    "FP8 activations": (compressed(config_groups=groups(inputs=FP8)), "activations of another kind"),
    "transformed inputs": (
        compressed(transform_config=transform("input", "Linear")),
        r"transform \('R4'\) for the input",
    ),
    "fp8": ({"quant_method": "fp8"}, "says quant_method fp8"),
    "AWQ method": ({"quant_method": "AWQ", "quant_algo": "NVFP4"}, "says quant_method awq"),
    "transformed outputs": (
        compressed(transform_config=transform("output", "re:.*attn.*", "re:.*down_proj$")),
        r"transform \('R4'\) for the output",
    ),
    "quark": ({"quant_method": "quark"}, "AMD Quark NVFP4"),
    "QUARK": ({"quant_method": "QUARK"}, "AMD Quark NVFP4"),
    "Quark": ({"quant_method": "Quark"}, "AMD Quark NVFP4"),
}
AGREES: dict[str, dict[str, Any]] = {
    "NVFP4": modelopt("NVFP4"),
    "lower case": modelopt("nvfp4"),
    "groups": modelopt("NVFP4", config_groups=groups()),
    "one of two groups": modelopt("NVFP4", config_groups={"a": ATTENTION, **groups()}),
    "mixed": modelopt("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}}),
    "mixed, elsewhere": modelopt("MIXED_PRECISION"),
    "no algorithm": {"quant_method": "modelopt"},
}
AGREES_COMPRESSED: dict[str, dict[str, Any]] = {
    "plain": compressed(),
    "mixed": compressed(config_groups={"fp8": groups(FP8, FP8)["group_0"], **groups()}),
    "no groups": compressed(config_groups={}),
    "presets": compressed(config_groups={"NVFP4": ["Linear"]}),
}
WARNED: dict[str, tuple[str, dict[str, Any], str]] = {
    "transforms in the weights": (
        "compressed-tensors",
        compressed(transform_config=transform("weight_input", "Linear")),
        "has transforms ('R4'): vLLM applies them to linear layers",
    ),
    "transforms of attention": (
        "compressed-tensors",
        compressed(transform_config=transform("input", "re:.*o_proj$")),
        "has transforms ('R4')",
    ),
    "transforms of nothing": (
        "compressed-tensors",
        compressed(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
        "has transforms ('R1')",
    ),
    "other spelling": ("compressed-tensors", modelopt("NVFP4"), "are stored as compressed-tensors stores NVFP4"),
    "another spelling": ("modelopt", compressed(), "are stored as modelopt stores NVFP4"),
    "excluded": (
        "modelopt",
        modelopt("NVFP4", ignore=["lm_head", "model.layers.0.mlp.experts*"]),
        "excludes 1 layer from quantization (model.layers.0.mlp.experts)",
    ),
    "excluded module": (
        "modelopt",
        modelopt("NVFP4", exclude_modules=["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts"]),
        "excludes 1 layer from quantization",
    ),
}


def source(folder: Path, quantization: Mapping[str, Any], kind: str = "modelopt") -> Path:
    tensors = merged([TinyLayer(kind=kind).tensors(), others()])
    return write(folder / "source", tensors, config(quantization_config=quantization))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    quantization, words = REFUSED[name]
    folder = source(tmp_path, quantization, kind)
    with pytest.raises(UnsupportedCheckpointError, match=words):
        plan(folder)
    result = run("convert", folder, tmp_path / "out")
    assert result.exit_code == 4
    assert not (tmp_path / "out").exists()
    found = inspect(folder)
    assert found.refusal in result.stderr
    assert [layer.status for layer in found.layers] == ["refused"]


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        *(pytest.param("modelopt", it, id=name) for name, it in AGREES.items()),
        *(pytest.param("compressed-tensors", it, id=name) for name, it in AGREES_COMPRESSED.items()),
    ],
)
def test_what_agrees_is_converted_without_a_word(tmp_path: Path, kind: str, quantization: dict[str, Any]) -> None:
    assert plan(source(tmp_path, quantization, kind)).warnings == ()


@pytest.mark.parametrize("name", WARNED)
@pytest.mark.slow
def test_what_servers_read_alike_is_a_warning_everywhere(tmp_path: Path, name: str) -> None:
    kind, quantization, words = WARNED[name]
    folder = source(tmp_path, quantization, kind)
    (warning,) = plan(folder).warnings
    assert words in warning
    dry_run, inspected = run("convert", folder, tmp_path / "out", "--dry-run"), run("inspect", folder)
    for result in (dry_run, inspected, run("convert", folder, tmp_path / "out", "--no-smoke", "-q")):
        assert result.exit_code == 0, result.output
        assert warning in result.stdout


@pytest.mark.parametrize("nested", [False, True])
def test_the_first_config_counts(tmp_path: Path, nested: bool) -> None:
    """vLLM reads hf_quant_config.json only where config.json says nothing."""
    said = {"quantization_config": modelopt("NVFP4")}
    conf = config(**({"quantization_config": None, "text_config": said} if nested else said))
    folder = write(tmp_path / "source", TinyLayer().tensors(), conf)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    (warning,) = plan(folder).warnings
    assert warning.startswith("hf_quant_config.json says quant_algo FP8")
    assert "quantization_config is the one that counts" in warning
    (folder / "config.json").write_text(json.dumps(config(quantization_config=None)))
    with pytest.raises(UnsupportedCheckpointError, match=r"hf_quant_config\.json says quant_algo FP8"):
        plan(folder)


ODD: tuple[object, ...] = (None, 5, "x", [], [1], {}, {"a": 1}, {"a": [1]}, {"a": {"apply": 5}}, {"a": {"apply": [5]}})


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize(
    "key", ["quant_method", "quant_algo", "config_groups", "ignore", "quantized_layers", "quantization"]
)
def test_odd_values_say_nothing_or_refuse(tmp_path: Path, key: str, odd: object) -> None:
    for quantization in (modelopt("NVFP4"), compressed(), modelopt("MIXED_PRECISION")):
        folder = source(tmp_path, {**quantization, key: odd, "transform_config": {"config_groups": odd}})
        found = inspect(folder)
        assert found.warnings or found.refusal or odd in (None, 5, "x", [], {}, [1])


def test_values_are_bounded_in_what_is_said(tmp_path: Path) -> None:
    long = "A" * 100_000
    assert len(inspect(source(tmp_path / "a", modelopt(long))).refusal) < 1000
    many = {f"R{number}{long}": {"type": "hadamard"} for number in range(5)}
    (warning,) = plan(source(tmp_path / "b", compressed(transform_config={"config_groups": many}), KINDS[1])).warnings
    assert len(warning) < 1000
