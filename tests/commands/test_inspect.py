"""Inspect says what a checkpoint is, and never fails on what convert refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nvfp4_prep import convert, convert_part, inspect, plan, relayout
from nvfp4_prep._util.text import count, spans
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.tensors import ShardHeader
from nvfp4_prep.cli import cli
from nvfp4_prep.cli.render import inspection_text, plan_text
from nvfp4_prep.commands.inspect import InspectedLayer, Inspection
from nvfp4_prep.errors import CheckpointError, SourceError
from support import tiny_checkpoints as tiny


def test_source(sample_source: Path) -> None:
    found = inspect(sample_source)
    assert not found.prepared
    assert found.refusal == ""
    assert found.quantization["quant_algo"] == "NVFP4"
    assert [(layer.experts, layer.intermediate, layer.hidden) for layer in found.layers] == [(5, 96, 336)] * 2
    assert all(layer.status == "can be prepared" for layer in found.layers)
    assert "convert would prepare it" in inspection_text(found)


class CountedSource(LocalSource):
    """Notes what is read of a checkpoint."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, int]] = []

    def header(self, file: str) -> ShardHeader:
        self.reads.append((file, 0))
        return super().header(file)

    def peek(self, file: str, offset_bytes: int, nbytes: int) -> bytes:
        self.reads.append((file, offset_bytes))
        return super().peek(file, offset_bytes, nbytes)


def test_a_source_is_read_as_often_as_for_its_plan(sample_source: Path) -> None:
    planned, inspected = CountedSource(sample_source), CountedSource(sample_source)
    plan(planned)
    assert inspect(inspected).refusal == ""
    assert inspected.reads == planned.reads
    assert len(planned.reads) > 2


def test_prepared(sample_prepared: Path) -> None:
    found = inspect(sample_prepared)
    assert found.prepared
    assert found.prepared_as["source"] == "source"
    assert found.prepared_as["tp_sizes"] == [1]
    assert {layer.status for layer in found.layers} == {"prepared"}
    assert "gate/up block 64" in inspection_text(found)


def test_what_convert_refuses(tmp_path: Path) -> None:
    layer = tiny.TinyLayer()
    incomplete = tiny.without(layer.tensors(), lambda name: name.endswith(".1.up_proj.weight_scale"))
    found = inspect(tiny.write(tmp_path / "incomplete", incomplete))
    assert "1.up_proj.weight_scale" in found.refusal
    assert found.layers[0].status == "refused"
    assert "convert would refuse" in inspection_text(found)
    only_weights = tiny.without(layer.tensors(), lambda name: name.endswith("input_scale"))
    all_w4a16 = inspect(tiny.write(tmp_path / "w4a16", only_weights))
    assert "W4A16" in all_w4a16.refusal
    assert [found.status for found in all_w4a16.layers] == ["cannot be prepared"]
    assert "passes through" not in inspection_text(all_w4a16)
    dense = inspect(tiny.write(tmp_path / "dense", {"model.norm.weight": torch.ones(4)}))
    assert dense.layers == ()
    assert dense.refusal


def weight_only(path: str) -> tiny.Tensors:
    return tiny.without(tiny.TinyLayer(path=path).tensors(), lambda name: name.endswith("input_scale"))


def test_layers_pass_through_only_where_others_are_prepared(tmp_path: Path) -> None:
    whole = tiny.TinyLayer(path="model.layers.1.mlp.experts").tensors()
    mixed = inspect(tiny.write(tmp_path / "mixed", whole | weight_only("model.layers.2.mlp.experts")))
    assert mixed.refusal == ""
    assert [layer.status for layer in mixed.layers] == ["passes through", "can be prepared"]
    incomplete = tiny.without(whole, lambda name: name.endswith(".1.up_proj.weight_scale"))
    refused = inspect(tiny.write(tmp_path / "refused", incomplete | weight_only("model.layers.2.mlp.experts")))
    assert refused.refusal
    assert {layer.status for layer in refused.layers} == {"refused", "cannot be prepared"}


def test_without_a_gate_nothing_is_said_of_gate_and_up(tmp_path: Path) -> None:
    tensors = tiny.TinyLayer(names=("up_proj", "down_proj")).tensors()
    source = tiny.write(tmp_path / "source", tensors, tiny.config(hidden_act="relu2"))
    found = inspect(source)
    assert (found.layers[0].status, found.layers[0].differing) == ("can be prepared", None)
    made = convert(source, tmp_path / "out")
    prepared = inspect(tmp_path / "out")
    assert prepared.layers[0].differing is None
    new = relayout(tmp_path / "out", tmp_path / "wide", moe_tp=2)
    assert new.manifest.options.moe_tp == 2
    card = (tmp_path / "out" / "README.md").read_text()
    shown = [inspection_text(found), inspection_text(prepared), plan_text(plan(source)), card]
    for text in shown:
        assert "gate/up" not in text and "gate and up" not in text.lower()
    assert len(made.manifest.layers) == 1


def test_plurals_and_spans(tmp_path: Path) -> None:
    tensors = tiny.TinyLayer(path="model.layers.1.mlp.experts").tensors()
    tensors |= tiny.TinyLayer(path="model.layers.3.mlp.experts").tensors()
    source = tiny.write(tmp_path / "source", tensors)
    text = plan_text(plan(source))
    assert "in 1 shard\n" in text and "2 MoE layers to prepare" in text
    assert "layers 1,3: E 3" in text
    assert "passes   0 other tensors, 0 other files" in text
    assert ", 1 safetensors file, " in inspection_text(inspect(source))
    assert [spans(numbers) for numbers in ([], [4], [3, 1, 2], [1, 2, 2, 7])] == ["", "4", "1-3", "1-2,7"]
    assert (count(1, "file"), count(0, "file"), count(2, "file")) == ("1 file", "0 files", "2 files")


def test_unfinished_conversion(sample_source: Path, tmp_path: Path) -> None:
    convert_part(sample_source, tmp_path / "out", "1/2")
    with pytest.raises(CheckpointError, match=r"not joined.*with --join in the place of --layers"):
        inspect(tmp_path / "out")


def test_a_config_without_a_quantization_method(sample_source: Path, tmp_path: Path) -> None:
    """It converts (a package's own format need not have one), but nobody should be surprised by vLLM."""
    copy = Path(shutil.copytree(sample_source, tmp_path / "copy"))
    said = "vLLM cannot serve: neither config.json nor hf_quant_config.json names a quantization method"
    assert said not in inspection_text(inspect(copy))
    (copy / "hf_quant_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    config.pop("quantization_config", None)
    (copy / "config.json").write_text(json.dumps(config))
    assert said in inspection_text(inspect(copy))
    assert said.replace("vLLM cannot", "vLLM     cannot") in plan_text(plan(copy))
    assert said in CliRunner().invoke(cli, ["convert", str(copy), str(tmp_path / "out"), "-q", "--no-smoke"]).output


def test_differing_scales_are_counted(tmp_path: Path) -> None:
    for differing, number in ((False, 0), (True, 3)):
        tensors = tiny.TinyLayer(differing=differing).tensors()
        assert inspect(tiny.write(tmp_path / str(differing), tensors)).layers[0].differing == number


def test_hub_cache_snapshot(sample_source: Path, tmp_path: Path) -> None:
    """Files are links to blobs beside the snapshots; label and commit come from the cache's folders."""
    repository = tmp_path / "models--nvidia--Kimi-NVFP4"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in sample_source.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert inspect(snapshot).refusal == ""
    (snapshot / "evil.json").symlink_to("/etc/hostname")
    with pytest.raises(SourceError, match="leaves the source"):
        inspect(snapshot)


def test_layers_that_differ_in_their_number_alone_share_a_line() -> None:
    def layer(path: str, experts: int = 8) -> InspectedLayer:
        return InspectedLayer(path, "can be prepared", "", experts, 128, 256, True, "modelopt", "silu", 0, (1, 2))

    paths = [f"model.layers.{number}.mlp.experts" for number in (1, 2, 3)]
    layers = (*map(layer, paths), layer("model.layers.4.mlp.experts", 9), layer("model.layers.6.mlp.experts"))
    more = (layer("experts"), layer("more"), layer("mtp.0.mlp.experts"), layer("model.layers.007.x"))
    found = Inspection("x", False, "", (), {}, (*layers, *more), 1, 1, 1)
    lines = [line for line in inspection_text(found).splitlines() if "can be prepared" in line]
    assert [line.split(": ")[0] for line in lines] == [
        "model.layers.1-3.mlp.experts",
        "model.layers.4.mlp.experts",
        "model.layers.6.mlp.experts",
        "experts",
        "more",
        "mtp.0.mlp.experts",
        "model.layers.007.x",
    ]
    assert "3 layers, each: can be prepared, E 8, I 128" in lines[0]


def test_layers_with_other_counts_of_differing_scales_share_a_line() -> None:
    def layer(number: int, differing: int, error: float | None = None) -> InspectedLayer:
        figures = {} if error is None else {"relative_error": {"reconcile": error, "vllm": 2 * error}}
        path = f"model.layers.{number}.mlp.experts"
        sizes = (8, 128, 256, True, "modelopt", "silu", differing, (1, 2))
        return InspectedLayer(path, "can be prepared", "", *sizes, gate_up_figures=figures)

    def shown(*layers: InspectedLayer) -> list[str]:
        found = Inspection("x", False, "", (), {}, layers, 1, 1, 1)
        return [line for line in inspection_text(found).splitlines() if line.startswith("model.layers")]

    (line,) = shown(layer(1, 0), layer(2, 3), layer(3, 1))
    assert line.startswith("model.layers.1-3.mlp.experts: 3 layers, each: ")
    assert "gate/up scales differ in 0 to 3 experts, TP 1, 2" in line
    assert "scales differ in 2 experts" in shown(layer(1, 2), layer(2, 2))[0]
    assert "scales agree" in shown(layer(1, 0), layer(2, 0))[0]
    (line,) = shown(layer(1, 2, 0.25), layer(2, 3, 0.5))
    assert line.endswith("worst relative error of their weights: reconcile 0.5, vllm 1")


def test_refused_layers_share_a_line() -> None:
    """A reason that names tensors of the layer differs in the layer's number alone."""

    def refused(number: int, tensor: str) -> InspectedLayer:
        path = f"model.layers.{number}.mlp.experts"
        return InspectedLayer(path, "refused", f"experts have biases ({path}.{tensor})")

    layers = (refused(0, "bias"), refused(1, "bias"), refused(2, "down_bias"))
    lines = inspection_text(Inspection("x", False, "", (), {}, layers, 1, 1, 1)).splitlines()
    assert "model.layers.0-1.mlp.experts: 2 layers, each: refused" in lines[3]
    assert "(experts have biases (model.layers.*.mlp.experts.bias))" in lines[3]
    assert "(experts have biases (model.layers.2.mlp.experts.down_bias))" in lines[4]
