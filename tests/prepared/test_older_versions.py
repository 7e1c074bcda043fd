"""Checkpoints that older versions wrote: nothing has to be converted again.

tests/data/prepared/0.1.0 was made by commit c64e05e of 2026-11-24:

    nvfp4-prep sample source --layers 2 --experts 2 --intermediate 64 --hidden 128 --vocabulary 16 --differing 1
    nvfp4-prep convert source prepared
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nvfp4_prep import SampleModel, convert, load_layer, relayout, restore, verify, write_sample
from support.checkpoint_files import file_digests, read_tensors
from support.paths import DATA

OLD = DATA / "prepared" / "0.1.0"
CHANGED_WORDING = {"README.md", "nvfp4_prep.json"}
"""The model card, and the manifest, which has its digest."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = SampleModel(layers=2, experts=2, intermediate=64, hidden=128, vocabulary=16, differing=1.0)
    write_sample(tmp_path / "source", model)
    return tmp_path / "source"


def test_it_is_verified_with_its_source(source: Path) -> None:
    report = verify(OLD, source=source)
    assert report.problems == () and report.ok


def test_it_is_the_same_conversion_as_today(source: Path, tmp_path: Path) -> None:
    made, old = file_digests(convert(source, tmp_path / "made").path), file_digests(OLD)
    assert made.keys() == old.keys()
    assert {name for name, digest in made.items() if digest != old[name]} <= CHANGED_WORDING
    layers = [json.loads((folder / "nvfp4_prep.json").read_text())["layers"] for folder in (OLD, tmp_path / "made")]
    assert layers[0] == layers[1]


def test_the_same_command_finds_it_complete(source: Path, tmp_path: Path) -> None:
    there = shutil.copytree(OLD, tmp_path / "there")
    before = file_digests(there)
    assert convert(source, there).already_complete
    assert file_digests(there) == before


def test_it_is_restored_and_relayouted(source: Path, tmp_path: Path) -> None:
    assert read_tensors(restore(OLD, tmp_path / "back").path) == read_tensors(source)
    again = relayout(OLD, tmp_path / "block16", gate_up_block=16).path
    assert verify(again, source=source).ok


def test_it_is_loaded(source: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "made").path
    old, new = (load_layer(folder, 1, ep=(1, 2)).tensors for folder in (OLD, made))
    assert old.keys() == new.keys() and new
    for name, tensor in new.items():
        assert tensor.shape[0] == 1
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), old[name].reshape(-1).view(torch.uint8)), name
