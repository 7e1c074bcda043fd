"""--load-format nvfp4_prep: the same parameters as vLLM's own load and preparation of the source, and its failures."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ParallelConfig

from nvfp4_prep.errors import LoadError, NvfpPrepError, ServingError, SourceError, VerificationError
from nvfp4_prep.load import options
from nvfp4_prep.load.options import default_threads
from nvfp4_prep.vllm import load_format
from support.serving.compare import Job, Outcome, run
from support.serving.families import FAMILIES
from support.serving.installed import reload_from
from support.serving.results import Checkpoints
from support.serving.states import differences, experts_state, snapshot, state_of, state_of_open, storage_of
from support.serving.tiny_models import TinyModel
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of

QWEN, DEEPSEEK, NEMOTRON = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"], FAMILIES["nemotron_h"]
LOAD: dict[str, Any] = {"load_format": "nvfp4_prep"}
VERIFY: dict[str, Any] = {**LOAD, "model_loader_extra_config": {"verify": True, "threads": 2, "others": "safetensors"}}
EP = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
PARALLEL: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_parallel_size": 2},
    "TP2 with EP": EP,
    "TP2 with EP, round robin": {**EP, "expert_placement_strategy": "round_robin"},
    "TP2 with EP, EPLB": {**EP, "enable_eplb": True, "eplb_config": {"num_redundant_experts": 2}},
    "PP2": {"pipeline_parallel_size": 2},
}
pytestmark = pytest.mark.usefixtures("plugin")


def assert_equal(outcome: Outcome) -> None:
    assert outcome.unsupported is None
    assert outcome.differences == []
    assert outcome.layers and outcome.compared >= 14 * outcome.layers


@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("load", [LOAD, VERIFY], ids=["plain", "verify"])
def test_every_family(checkpoints: Checkpoints, model: TinyModel, load: dict[str, Any]) -> None:
    source, prepared = checkpoints.get(model)
    assert_equal(run(Job(str(source), str(prepared), prepared_load=load)))


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL.keys())
def test_ranks(checkpoints: Checkpoints, ranks: Any, model: TinyModel, parallel: dict[str, Any]) -> None:
    source, prepared = checkpoints.get(model)
    for outcome in ranks.run(Job(str(source), str(prepared), options={"parallel": parallel}, prepared_load=VERIFY)):
        assert_equal(outcome)


def test_no_expert_tensor_comes_through_vllms_iterator(checkpoints: Checkpoints) -> None:
    source, prepared = checkpoints.get(DEEPSEEK)
    ours = run(Job(str(source), str(prepared), prepared_load=LOAD))
    stock = run(Job(str(source), str(prepared)))
    assert ours.prepared.tensors == stock.prepared.tensors - 4 * ours.layers
    assert ours.prepared.calls == stock.prepared.calls == 8 * ours.layers


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK, NEMOTRON], ids=lambda model: model.family)
def test_all_other_parameters_are_those_of_vllms_default(
    checkpoints: Checkpoints, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, routers and embeddings, though vLLM's own reader of them is never called."""
    _, prepared = checkpoints.get(model)
    states = []
    for load in ({}, LOAD):
        config = make_vllm_config(prepared, moe_backend="auto", load=load)
        with rank_of(config):
            loaded = load_model(config)
            states.append({name: value.detach().clone() for name, value in loaded.named_parameters()})
        monkeypatch.setattr(
            "vllm.model_executor.model_loader.default_loader.safetensors_weights_iterator", _never_called
        )
    stock, ours = states
    stored = json.loads((prepared / "model.safetensors.index.json").read_text())["weight_map"]
    others = [name for name in stored if ".experts." not in name and name in stock]
    assert others
    for name, value in ((name, stock[name]) for name in others):
        assert torch.equal(value.flatten().view(torch.uint8), ours[name].flatten().view(torch.uint8)), name


def _never_called(*_args: object, **_kw: object) -> Any:
    raise AssertionError("vLLM's default reader was called")


def test_reload_uses_tensors_with_data(checkpoints: Checkpoints) -> None:
    _, prepared = checkpoints.get(DEEPSEEK)
    _, other = checkpoints.get(replace(DEEPSEEK, family="deepseek_v3y"))
    config = make_vllm_config(prepared, moe_backend="auto", load=LOAD)
    with rank_of(config):
        loaded = load_model(config)
        first, where = snapshot(loaded), storage_of(loaded)
        for directory in (other, prepared):
            reload_from(config, loaded, directory)
            assert storage_of(loaded) == where
            if directory == other:
                assert differences(experts_state(loaded), state_of_open(other)) == []
        assert differences(first, snapshot(loaded)) == []


class TestFailures:
    @pytest.fixture
    def copy(self, checkpoints: Checkpoints, tmp_path: Path) -> Path:
        shutil.copytree(checkpoints.get(QWEN)[1], tmp_path / "copy")
        return tmp_path / "copy"

    def file(self, directory: Path) -> Path:
        return sorted(directory.glob("experts-layer-*.safetensors"))[0]

    def fails(self, directory: Path, load: dict[str, Any], kind: type[NvfpPrepError], match: str) -> None:
        with pytest.raises(kind, match=match):
            state_of(directory, load=load)

    def test_damaged(self, copy: Path) -> None:
        with self.file(copy).open("r+b") as stream:
            stream.seek(-100, os.SEEK_END)
            byte = stream.read(1)[0]
            stream.seek(-100, os.SEEK_END)
            stream.write(bytes([byte ^ 1]))
        state_of(copy, load=LOAD)
        self.fails(copy, VERIFY, VerificationError, r"experts-layer-.*w2_weight_scale.*expert 7")

    def test_truncated(self, copy: Path) -> None:
        os.truncate(self.file(copy), self.file(copy).stat().st_size - 8)
        self.fails(copy, LOAD, SourceError, r"experts-layer-.*file size does not match")

    def test_missing_file_of_a_layer(self, copy: Path) -> None:
        file = self.file(copy)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            state_of(copy, load=LOAD)
        index = json.loads((copy / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name: there for name, there in index["weight_map"].items() if there != file.name}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        self.fails(copy, LOAD, ServingError, "4 of 8 tensors of prepared experts did not arrive")

    def test_unreadable(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("nvfp4_prep.load.reader.os.preadv", refuse)
        self.fails(copy, LOAD, LoadError, r"\.safetensors.*Input/output error")

    def test_verify_needs_the_manifest(self, copy: Path) -> None:
        (copy / "nvfp4_prep.json").unlink()
        state_of(copy, load=LOAD)
        self.fails(copy, VERIFY, ServingError, "verify needs nvfp4_prep.json")

    def test_a_checkpoint_that_is_not_prepared(self, checkpoints: Checkpoints) -> None:
        with pytest.raises(ServingError, match="found no prepared experts"):
            state_of(checkpoints.get(QWEN)[0], load=LOAD, moe_backend="flashinfer_cutedsl")

    def test_others_cannot_be_itself(self, checkpoints: Checkpoints) -> None:
        load = {**LOAD, "model_loader_extra_config": {"others": "nvfp4_prep"}}
        self.fails(checkpoints.get(QWEN)[1], load, ServingError, "others cannot be nvfp4_prep")

    def test_options_of_neither(self, checkpoints: Checkpoints) -> None:
        load = {**LOAD, "model_loader_extra_config": {"thread": 3}}
        with pytest.raises(ValueError, match="thread"):
            state_of(checkpoints.get(QWEN)[1], load=load)

    def test_a_model_that_cannot_be_built_leaves_no_threads(self, checkpoints: Checkpoints) -> None:
        load = {"load": LOAD, "moe_backend": "marlin"}
        with pytest.raises(ServingError, match="an MoE backend was asked for that wants weights in another form"):
            state_of(checkpoints.get(QWEN)[1], **load)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("nvfp4-load")]


@pytest.mark.parametrize(
    ("parallel", "devices", "ranks"),
    [
        ({"tensor_parallel_size": 8}, 8, 8),
        ({"data_parallel_size": 8}, 8, 8),
        ({"data_parallel_size": 4, "tensor_parallel_size": 2}, 8, 8),
        ({"data_parallel_size": 16}, 8, 8),
        ({}, 8, 1),
    ],
    ids=str,
)
def test_threads_are_shared_by_all_ranks_of_a_host(
    parallel: dict[str, int], devices: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(parallel_config=ParallelConfig(distributed_executor_backend="mp", **parallel))
    monkeypatch.setattr(load_format, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(options, "usable_cores", lambda: 64)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    assert load_format._threads() == default_threads(64 // ranks)
