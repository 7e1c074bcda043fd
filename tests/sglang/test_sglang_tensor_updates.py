"""A trainer's tensors for a running server (SGLang's own WeightUpdater): served to the last bit, or nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_compare import failing_once
from sglang_models import MODELS, Checkpoints
from sglang_on_cpu import load_model, make_server_args, rank_of
from sglang_results import REFUSALS
from sglang_running import FIRST, LAST, OTHER_BYTES, QWEN, WAYS, Running, renamed
from sglang_states import differences, snapshot, storage_of
from sglang_trainer import experts_alone, others_alone, sent_from, tensors_in
from test_sglang_arrivals import passing_over

from nvfp4_prep.errors import ServingError
from nvfp4_prep.serving.stamp_tensor import STAMP_TENSOR

pytestmark = pytest.mark.usefixtures("plugin")


def state_of(directory: Path, backend: str = "auto") -> dict[str, Any]:
    args = make_server_args(directory, moe_runner_backend=backend)
    with rank_of(args):
        return snapshot(load_model(args))


@pytest.mark.parametrize("way", ["tensors", "serialized", "bucket", "broadcast"])
@pytest.mark.parametrize(
    ("trtllm", "backend"),
    [(False, "auto"), (True, "auto"), (False, "flashinfer_trtllm")],
    ids=["cutedsl", "trtllm", "permuted"],
)
def test_a_whole_checkpoint(
    checkpoints: Checkpoints, start: Callable[..., Running], trtllm: bool, backend: str, way: str
) -> None:
    """Experts are ready when the call returns; otherwise a session that is never closed would serve stale scales."""
    served, other = (checkpoints.get(model, trtllm=trtllm)[1] for model in (QWEN, OTHER_BYTES))
    expected = state_of(other, backend)
    running = start(served, backend=backend)
    running.updater.begin_weight_update()
    named = sent_from(other)
    assert WAYS[way](running.updater, list(named.items()))[0]
    assert not any(map(vars, named.values()))  # the trainer's tensors are its own
    assert differences(expected, snapshot(running.model)) == []
    running.updater.end_weight_update(run_post_load=False)
    assert differences(expected, snapshot(running.model)) == []
    assert storage_of(running.model) == running.storage


@pytest.mark.parametrize("backend", ["auto", "flashinfer_trtllm"], ids=["as it is", "permuted"])
def test_some_layers_and_everything_but_experts(
    checkpoints: Checkpoints, start: Callable[..., Running], backend: str
) -> None:
    """What did not come stays as it is; otherwise it would be permuted twice."""
    served, other = (checkpoints.get(model)[1] for model in (QWEN, OTHER_BYTES))
    expected = state_of(other, backend)
    running = start(served, backend=backend)
    assert running.send(others_alone(sent_from(other)))[0]
    changed = running.changed()
    assert any("qkv_proj" in name for name in changed) and not any("/" in name for name in changed)
    first_layer = {name: tensor for name, tensor in sent_from(other).items() if FIRST in name or name == STAMP_TENSOR}
    assert running.send(first_layer, "broadcast")[0]
    left = differences(expected, snapshot(running.model))
    assert left and all(name.startswith(f"{LAST}/") for name in left)


@pytest.mark.parametrize("way", ["direct", "custom"])
def test_what_is_not_of_experts_by_other_loaders(
    checkpoints: Checkpoints, start: Callable[..., Running], way: str
) -> None:
    running = start(checkpoints.get(QWEN)[1])
    assert running.send({"model.norm.weight": torch.full((256,), 0.5)}, way)[0]
    assert running.changed() == ["model.norm.weight"]


@pytest.mark.parametrize("way", ["tensors", "broadcast"])
def test_experts_that_fail_in_the_middle_end_the_server(
    checkpoints: Checkpoints, start: Callable[..., Running], way: str
) -> None:
    running = start(checkpoints.get(QWEN)[1])
    with failing_once(), pytest.raises(ServingError, match=r"failed in the middle.*Input/output error"):
        running.send(sent_from(checkpoints.get(OTHER_BYTES)[1]), way)


@pytest.mark.parametrize(
    ("way", "words"), [("broadcast", "partially updated"), ("tensors", "Error: ")], ids=["broadcast", "tensors"]
)
def test_other_tensors_that_sglang_fails_with(
    checkpoints: Checkpoints, start: Callable[..., Running], way: str, words: str
) -> None:
    """They come first: experts are not touched before SGLang took them. It answers, or raises."""
    plain = MODELS["qwen3_moe"]  # has no attention in its files, whose shapes could be compared
    running = start(checkpoints.get(plain)[1])
    _, other = checkpoints.get(replace(plain, family="qwen3_moex"))
    bad = {"model.layers.1.self_attn.q_proj.weight": torch.zeros(3, 3)}
    success, message = running.send(sent_from(other) | bad, way)
    assert not success and words in message and ". No prepared experts were written. Of the other" in message
    assert not any("/" in name for name in running.changed())
    REFUSALS.append((f"tensors of a trainer: others fail in SGLang, {way}", message))


def test_experts_that_a_model_class_passes_over_end_the_server(
    checkpoints: Checkpoints, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(checkpoints.get(QWEN)[1])
    passing_over(monkeypatch, type(running.model), f"{LAST}.")
    with pytest.raises(ServingError, match=f"model class passed over {LAST}"):
        running.send(sent_from(checkpoints.get(OTHER_BYTES)[1]))


def test_tensors_that_come_outside_of_an_update(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """A custom loader of the user's may call the model itself, with names of its own."""
    running = start(checkpoints.get(QWEN)[1])
    named = renamed(experts_alone(tensors_in(checkpoints.get(OTHER_BYTES)[1])), ".routed_experts", "")
    with pytest.raises(ServingError, match="came for a running kernel's parameter"):
        running.model.load_weights(list(named.items()))
    assert running.changed() == []


def test_a_directory_that_no_longer_has_the_served_weights(
    checkpoints: Checkpoints, start: Callable[..., Running]
) -> None:
    """An update from disk that fails in the middle has nothing to go back to, and says so."""
    served, other = (checkpoints.get(model)[1] for model in (QWEN, OTHER_BYTES))
    running = start(served)
    assert running.send({"model.norm.weight": torch.full((256,), 0.5)})[0]
    assert running.updater.update_weights_from_disk(str(other), "auto")[0]
    with failing_once():
        success, message = running.updater.update_weights_from_disk(str(served), "auto")
    assert not success and message.endswith("which were loaded again.")
    assert running.send({"model.norm.weight": torch.full((256,), 0.5)})[0]
    with failing_once(), pytest.raises(ServingError, match="came as tensors and are in no file"):
        running.updater.update_weights_from_disk(str(served), "auto")


@pytest.mark.parametrize("trtllm", [False, True], ids=["permuted", "trtllm"])
def test_layers_whose_experts_were_lost(checkpoints: Checkpoints, start: Callable[..., Running], trtllm: bool) -> None:
    """SGLang asks for single experts by the source's names when a rank is gone (elastic expert parallelism)."""
    running = start(checkpoints.get(QWEN, trtllm=trtllm)[1], backend="flashinfer_trtllm")
    lost = running.model.model.layers[1].mlp.experts
    for param in lost.parameters():
        param.data.reshape(-1).view(torch.uint8).fill_(0x3B)
    assert running.changed()
    kept = storage_of(running.model)

    def asked(name: str) -> bool:
        return name.startswith(f"{LAST}.2.")

    ask = partial(running.updater.update_weights_from_disk, "elsewhere", "auto", weight_name_filter=asked)
    assert ask()[0]
    assert running.changed() == [] and storage_of(running.model) == kept
    assert running.send({"model.norm.weight": torch.full((256,), 0.5)})[0]
    with pytest.raises(ServingError, match="came as tensors and are in no file"):
        ask()


def test_a_server_that_started_with_dummy_weights(
    checkpoints: Checkpoints, start: Callable[..., Running], tmp_path: Path
) -> None:
    """A trainer sends all weights; what they must be is read from the directory, whose files SGLang leaves alone."""
    served, other = (checkpoints.get(model)[1] for model in (QWEN, OTHER_BYTES))
    expected = state_of(other)
    running = start(served, load_format="dummy")
    refused = running.updater.update_weights_from_disk(
        str(checkpoints.get(OTHER_BYTES.with_sizes(4, 256, 192))[1]), "auto"
    )
    assert not refused[0] and "another model than the served one" in refused[1]
    assert running.changed() == []
    assert running.send(sent_from(other))[0]
    left = differences(expected, snapshot(running.model))
    assert not set(left) & set(sent_from(other)) and all("norm.weight" in name for name in left)  # in no file


def test_stock_checkpoints_are_updated_as_ever(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    running = start(checkpoints.get(QWEN)[0], backend="flashinfer_trtllm")
    named = {"model.norm.weight": torch.full((256,), 0.5), f"{LAST}.nothing": torch.zeros(1)}
    for way in ("tensors", "broadcast"):
        assert WAYS[way](running.updater, list(named.items()))[0]
    success, message = running.updater.update_weights_from_ipc(SimpleNamespace(zmq_handles={}))
    assert not success and "nvfp4" not in message


def test_a_model_class_that_takes_a_layer_in_part_ends_the_server(
    checkpoints: Checkpoints, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(checkpoints.get(QWEN)[1])
    passing_over(monkeypatch, type(running.model), f"{LAST}.w2_weight_scale")
    with pytest.raises(ServingError, match="did not arrive: w2_weight_scale, w2_weight_scale_2"):
        running.send(sent_from(checkpoints.get(OTHER_BYTES)[1]))


def test_a_layer_whose_scales_cannot_be_derived_ends_the_server(
    checkpoints: Checkpoints, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SGLang answers in the place of an exception counts as one, too."""
    running = start(checkpoints.get(QWEN)[1])
    monkeypatch.setattr(type(running.model), "load_weights", lambda *_: 1 / 0)
    for way in ("tensors", "broadcast"):
        with pytest.raises(ServingError, match=r"in the middle: .*division by zero"):
            running.send(experts_alone(sent_from(checkpoints.get(OTHER_BYTES)[1])), way)


def test_tensors_that_are_not_contiguous(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """A trainer's own views and parameters."""
    served, other = (checkpoints.get(model, trtllm=True)[1] for model in (QWEN, OTHER_BYTES))
    expected, running = state_of(other), start(served)
    named = sent_from(other)
    strided = {
        name: tensor.view(torch.uint8).transpose(0, -1).contiguous().transpose(0, -1).view(tensor.dtype)
        for name, tensor in experts_alone(named).items()
        if tensor.dim() > 1
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    vectors = {n: torch.nn.Parameter(t) for n, t in experts_alone(named).items() if t.dtype == torch.float32}
    assert running.send(named | strided | vectors)[0]
    assert differences(expected, snapshot(running.model)) == []


def test_different_scales_of_gate_and_up(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """For the kernel that takes both."""
    _, served = checkpoints.get(QWEN, trtllm=True)
    _, other = checkpoints.get(replace(OTHER_BYTES, equal_gate_up=False), trtllm=True)
    expected, running = state_of(other), start(served)
    named = sent_from(other)
    assert any(
        not torch.equal(named[name], named[f"{name}_up"]) for name in named if name.endswith("w13_weight_scale_2")
    )
    assert running.send(named)[0]
    assert differences(expected, snapshot(running.model)) == []


def test_the_stamp_more_than_once(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """As a trainer sends it that packs layer by layer."""
    served, other = (checkpoints.get(model)[1] for model in (QWEN, OTHER_BYTES))
    expected, named = state_of(other), sent_from(other)
    running = start(served)
    assert WAYS["tensors"](running.updater, [(STAMP_TENSOR, named[STAMP_TENSOR]), *named.items()])[0]
    assert differences(expected, snapshot(running.model)) == []
