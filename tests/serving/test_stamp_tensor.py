"""The stamp as a tensor: it tells the layout of prepared tensors that come without a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions, LayoutName
from nvfp4_prep.prepared.stamp import Stamp, stamp_in
from nvfp4_prep.serving.stamp_tensor import STAMP_TENSOR, config_of_stamp_tensor, stamp_tensor
from nvfp4_prep.serving.updates import check_same_layout, read_config
from support.tiny_checkpoints import TinyLayer, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("stamp") / "source", TinyLayer().tensors())


def stamp_of(directory: Path) -> Stamp:
    found = stamp_in(read_config(directory))
    assert found is not None
    return Stamp.parse(found)


def test_it_tells_the_layout(source: Path, tmp_path: Path) -> None:
    for name in (LayoutName.CUTEDSL, LayoutName.TRTLLM):
        convert(source, tmp_path / name.value, ConvertOptions(layout=name))
    name, tensor = stamp_tensor(tmp_path / "cutedsl")
    assert (name, tensor.dtype, tensor.dim()) == (STAMP_TENSOR, torch.uint8, 1)
    config = config_of_stamp_tensor(tensor)
    check_same_layout(stamp_of(tmp_path / "cutedsl"), config, "here")
    with pytest.raises(ServingError, match="another layout"):
        check_same_layout(stamp_of(tmp_path / "trtllm"), config, "here")


def test_it_is_small_whatever_the_source_says(source: Path, tmp_path: Path) -> None:
    """A source's list of modules that are not quantized can have 100 kB."""
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["source"]["ignore"] = [f"layer.{number}" for number in range(10_000)]
    config["quantization_config"]["ignore"] = config["quantization_config"]["source"]["ignore"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert stamp_tensor(tmp_path / "out")[1].numel() < 1_000


def test_a_directory_without_a_stamp(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="no stamp of nvfp4-prep"):
        stamp_tensor(source)
    with pytest.raises(ServingError, match=r"config\.json"):
        stamp_tensor(tmp_path)


def test_a_stamp_of_a_later_version(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServingError, match="format that this version"):
        stamp_tensor(tmp_path / "out")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.tensor(list(b"{}".ljust(100_000)), dtype=torch.uint8),
        torch.tensor(list(b'{"a": '), dtype=torch.uint8),
        torch.tensor([255, 254], dtype=torch.uint8),
    ],
    ids=["dtype", "shape", "size", "no JSON", "no text"],
)
def test_what_is_not_a_stamp(tensor: torch.Tensor) -> None:
    with pytest.raises(ServingError, match=f"tensor {STAMP_TENSOR}"):
        config_of_stamp_tensor(tensor)
