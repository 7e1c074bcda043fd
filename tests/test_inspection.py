"""Inspect says what a checkpoint is, and never fails on what convert refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import tiny_checkpoints as tiny
from nvfp4_prep import inspect
from nvfp4_prep.errors import SourceError
from nvfp4_prep.reporting import inspection_text


def test_source(sample_source: Path) -> None:
    found = inspect(sample_source)
    assert not found.prepared
    assert found.refusal == ""
    assert found.quantization["quant_algo"] == "NVFP4"
    assert [(layer.experts, layer.intermediate, layer.hidden) for layer in found.layers] == [(5, 96, 336)] * 2
    assert all(layer.status == "can be prepared" for layer in found.layers)
    assert "convert would prepare it" in inspection_text(found)


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
    weight_only = tiny.without(layer.tensors(), lambda name: name.endswith("input_scale"))
    assert "W4A16" in inspect(tiny.write(tmp_path / "w4a16", weight_only)).refusal
    dense = inspect(tiny.write(tmp_path / "dense", {"model.norm.weight": torch.ones(4)}))
    assert dense.layers == ()
    assert dense.refusal


def test_differing_scales_are_counted(tmp_path: Path) -> None:
    for differing, count in ((False, 0), (True, 3)):
        tensors = tiny.TinyLayer(differing=differing).tensors()
        assert inspect(tiny.write(tmp_path / str(differing), tensors)).layers[0].differing == count


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
