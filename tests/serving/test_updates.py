"""New weights for a running model: the layout and the layers that their directory must have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.errors import CheckpointError, ServingError
from nvfp4_prep.load import Catalog
from nvfp4_prep.options import ConvertOptions, LayoutName
from nvfp4_prep.prepared.stamp import Stamp, stamp_in
from nvfp4_prep.serving.placement import Placement
from nvfp4_prep.serving.updates import check_holds_layers, check_same_layout, read_config
from support.tiny_checkpoints import TinyLayer, write

ANOTHER = {
    "batched": ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED),
    "trtllm": ConvertOptions(layout=LayoutName.TRTLLM),
    "block": ConvertOptions(gate_up_block=16),
    "moe-tp": ConvertOptions(moe_tp=2),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = [TinyLayer(path=f"model.layers.{number}.mlp.experts") for number in (0, 1)]
    return write(tmp_path_factory.mktemp("updates") / "source", layers[0].tensors() | layers[1].tensors())


@pytest.fixture(scope="module")
def prepared(source: Path) -> Path:
    convert(source, source.parent / "prepared")
    return source.parent / "prepared"


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "copy")


def stamp_of(directory: Path) -> Stamp:
    found = stamp_in(read_config(directory))
    assert found is not None
    return Stamp.parse(found)


def served(directory: Path) -> list[Placement]:
    """The layers as a server has them, which may name the model's parts otherwise."""
    return [
        Placement(
            f"language_model.{layer.experts_path}", layer.layout, layer.dims, 0, 1, tuple(range(layer.dims.experts))
        )
        for layer in Catalog.open(directory).manifest.layers
    ]


def test_the_same_layout_of_another_source(prepared: Path) -> None:
    config: dict[str, Any] = json.loads((prepared / "config.json").read_text())
    config["quantization_config"]["source"]["producer"] = {"name": "another"}
    check_same_layout(stamp_of(prepared), config, "config.json")
    check_same_layout(stamp_of(prepared), {"text_config": config}, "config.json")


@pytest.mark.parametrize("options", ANOTHER.values(), ids=ANOTHER)
def test_another_layout(source: Path, prepared: Path, tmp_path: Path, options: ConvertOptions) -> None:
    convert(source, tmp_path / "other", options)
    config = read_config(tmp_path / "other")
    with pytest.raises(ServingError, match="weights of another layout than the served one") as refused:
        check_same_layout(stamp_of(prepared), config, "there/config.json")
    assert (refused.value.where, refused.value.next_step is None) == ("there/config.json", False)
    assert refused.value.expected != refused.value.actual


def test_a_source_has_no_stamp(source: Path, prepared: Path) -> None:
    with pytest.raises(ServingError, match="no stamp of nvfp4-prep"):
        check_same_layout(stamp_of(prepared), read_config(source), "config.json")


@pytest.mark.parametrize("text", [None, "[1]", "{"], ids=["missing", "a list", "damaged"])
def test_a_config_without_a_stamp(prepared: Path, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ServingError, match=r"config\.json"):
        check_same_layout(stamp_of(prepared), read_config(tmp_path), str(tmp_path / "config.json"))


def test_a_rank_of_a_pipeline_has_some_of_the_layers(prepared: Path) -> None:
    check_holds_layers(prepared, served(prepared))
    check_holds_layers(prepared, served(prepared)[1:])


def lose_a_file(directory: Path) -> None:
    sorted(directory.glob("experts-layer-*"))[-1].unlink()


def cut_a_file(directory: Path) -> None:
    file = sorted(directory.glob("experts-layer-*"))[-1]
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [lose_a_file, cut_a_file])
def test_files_of_layers_that_are_not_whole(prepared: Path, copy: Path, damage: Callable[[Path], None]) -> None:
    """Of layers that this rank does not serve, too: another rank would notice when this one has loaded."""
    damage(copy)
    with pytest.raises(CheckpointError, match="experts-layer-"):
        check_holds_layers(copy, served(prepared)[:1])


@pytest.mark.parametrize(
    ("change", "actual"),
    [
        (lambda placement: replace(placement, dims=replace(placement.dims, experts=4)), "(F32 [3], not F32 [4])"),
        (lambda placement: replace(placement, layer_name="model.layers.7.mlp.experts"), "no such prepared layer"),
    ],
    ids=["sizes", "number"],
)
def test_another_model(prepared: Path, change: Callable[[Placement], Placement], actual: str) -> None:
    with pytest.raises(ServingError, match="weights of another model than the served one") as refused:
        check_holds_layers(prepared, [change(placement) for placement in served(prepared)])
    assert actual in refused.value.what
