"""What a trainer must not send to a running server (SGLang's own WeightUpdater): it is refused, and nothing changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_models import COMPRESSED_QWEN, Checkpoints
from sglang_results import REFUSALS
from sglang_running import FIRST, FORMER, LAST, OTHER_BYTES, QWEN, WAYS, Running, renamed, without
from sglang_trainer import Named, experts_alone, others_alone, sent_from, tensors_in

from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.serving.stamp_tensor import STAMP_TENSOR
from nvfp4_prep.sglang.tensor_updates import NotReceived


def source(c: Checkpoints) -> Named:
    return tensors_in(c.get(OTHER_BYTES)[0])


def sent(c: Checkpoints, options: ConvertOptions | None = None, **kind: bool) -> Named:
    return sent_from(c.get(OTHER_BYTES, options, **kind)[1])


def one_more(named: Named) -> Named:
    return named | renamed(experts_alone(named), "layers.1", "layers.2")


def as_bytes(named: Named) -> Named:
    return {name: tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for name, tensor in named.items()}


UP = f"{FIRST}.routed_experts.w13_weight_scale_2_up"
FOREIGN = "tensors of experts came that the served checkpoint does not have"
SIZES = "another model than the served one: it has in other sizes"
WHAT: dict[str, tuple[Callable[[Checkpoints], Named], str, str]] = {
    "source": (source, "tensors", FOREIGN),
    "source by broadcast": (source, "broadcast", FOREIGN),
    "another layout": (lambda c: sent(c, trtllm=True), "tensors", f"{FOREIGN}; found {UP}"),
    "another layout's bytes": (
        lambda c: without(sent(c, trtllm=True), UP.rpartition(".")[2]),
        "tensors",
        "weights of another layout than the served one",
    ),
    "another block height": (
        lambda c: sent(c, ConvertOptions(gate_up_block=16)),
        "broadcast",
        "weights of another layout than the served one",
    ),
    "no stamp": (lambda c: without(sent(c), STAMP_TENSOR), "bucket", "without the stamp of their layout"),
    "not a stamp": (lambda c: sent(c) | {STAMP_TENSOR: torch.ones(2, 2)}, "tensors", "is not a stamp"),
    "a damaged stamp": (
        lambda c: sent(c) | {STAMP_TENSOR: torch.full((3,), 91, dtype=torch.uint8)},
        "tensors",
        f"tensor {STAMP_TENSOR}: ",
    ),
    "without scales": (
        lambda c: without(sent(c), "w13_weight_scale"),
        "tensors",
        "a prepared layer came without some of its tensors",
    ),
    "SGLang's names": (lambda c: renamed(sent(c), ".routed_experts", ""), "tensors", FOREIGN),
    "a layer more": (lambda c: one_more(sent(c)), "tensors", f"{FOREIGN}; found model.layers.2."),
    "other sizes": (
        lambda c: experts_alone(sent_from(c.get(OTHER_BYTES.with_sizes(4, 256, 192))[1])),
        "broadcast",
        SIZES,
    ),
    "other dtype": (lambda c: as_bytes(sent(c)), "tensors", "(U8 ["),
    "another norm": (
        lambda c: sent(c) | {"model.norm.weight": torch.zeros(255)},
        "tensors",
        f"{SIZES} model.norm.weight",
    ),
    "direct": (lambda c: renamed(sent(c), ".routed_experts", ""), "direct", "direct writes over"),
    "a custom loader": (sent, "custom", "custom writes over"),
    "direct, unknown": (
        lambda c: {"model.norm.weight": torch.zeros(256), "model.norm.bias": torch.zeros(256)},
        "direct",
        "no parameters for; found model.norm.bias",
    ),
    "direct, other sizes": (lambda c: {"lm_head.weight": torch.zeros(4, 4)}, "direct", f"{SIZES} lm_head.weight"),
}


@pytest.mark.parametrize("what", WHAT)
def test_what_must_not_be_served_changes_nothing(
    checkpoints: Checkpoints, start: Callable[..., Running], what: str
) -> None:
    make, way, words = WHAT[what]
    named = make(checkpoints)
    running = start(checkpoints.get(QWEN)[1])
    success, message = running.send(named, way)
    assert not success
    assert words in message and message.endswith(FORMER)
    assert running.changed() == []
    assert running.send(sent_from(checkpoints.get(OTHER_BYTES)[1]))[0]
    REFUSALS.append((f"tensors of a trainer: {what}", message))


@pytest.mark.parametrize("name", [f"{FIRST}.routed_experts.w13_weight", "model.norm.weight"])
def test_a_tensor_that_comes_twice_changes_nothing(
    checkpoints: Checkpoints, start: Callable[..., Running], name: str
) -> None:
    """Only the last one of a name would be compared with the served one; SGLang would load both."""
    named, running = sent(checkpoints), start(checkpoints.get(QWEN)[1])
    success, message = WAYS["tensors"](running.updater, [(name, named[name]), *named.items()])
    assert not success
    assert f"tensors came twice; found {name}" in message and message.endswith(FORMER)
    assert running.changed() == []


def test_names_that_nobody_knows(checkpoints: Checkpoints, start: Callable[..., Running], tmp_path: Path) -> None:
    """A directory that has the config alone, which is enough for dummy weights."""
    served, other = (checkpoints.get(model)[1] for model in (QWEN, OTHER_BYTES))
    shutil.copy(served / "config.json", tmp_path)
    running = start(tmp_path, load_format="dummy")
    success, message = running.send(sent_from(other))
    assert not success and "not loaded from local files" in message and running.changed() == []
    assert running.send(others_alone(sent_from(other)))[0]
    REFUSALS.append(("tensors of a trainer: names unknown", message))


def test_checkpoint_engine(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    running = start(checkpoints.get(QWEN)[1])
    success, message = running.updater.update_weights_from_ipc(SimpleNamespace(zmq_handles={}))
    assert not success and "cannot be checked before parameters are written" in message and message.endswith(FORMER)
    REFUSALS.append(("update_weights_from_ipc", message))


def test_two_stamps(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    named, running = sent(checkpoints), start(checkpoints.get(QWEN)[1])
    stamps = [(STAMP_TENSOR, sent(checkpoints, trtllm=True)[STAMP_TENSOR]), (STAMP_TENSOR, named.pop(STAMP_TENSOR))]
    for both in (stamps, stamps[::-1]):
        success, message = WAYS["tensors"](running.updater, [*both, *named.items()])
        assert not success and "weights of another layout than the served one" in message
    assert running.changed() == []


class Subclass(torch.Tensor):
    """As trainers have them for shards."""


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """To read it would end the process."""
    gone = tensor.clone()
    gone.untyped_storage().resize_(0)
    return gone


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The last byte is gone."""
    short = tensor.clone()
    short.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return short


NO_DATA: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "meta": (lambda tensor: tensor.to("meta"), "has no data; found a tensor on the meta device"),
    "freed": (freed, "has no data; found a storage that was freed"),
    "cut": (cut, "has no data; found a storage that was freed"),
    "sparse": (lambda tensor: tensor.to_sparse(), "expected a plain dense tensor, found Tensor, torch.sparse_coo"),
    "subclass": (lambda tensor: tensor.as_subclass(Subclass), "expected a plain dense tensor, found Subclass"),
    "a list": (lambda tensor: tensor.tolist(), "an update cannot be unpacked or checked (AttributeError: "),
    "nothing": (lambda tensor: tensor[:0], "another model than the served one: it has in other sizes"),
}


@pytest.mark.parametrize("what", NO_DATA)
def test_tensors_that_cannot_be_copied(checkpoints: Checkpoints, start: Callable[..., Running], what: str) -> None:
    """Once parameters are written, what cannot be copied would end the server."""
    change, words = NO_DATA[what]
    named, running = sent(checkpoints), start(checkpoints.get(QWEN)[1])
    name = f"{LAST}.routed_experts.w2_weight_scale_2"
    success, message = running.send(named | {name: change(named[name])})
    assert not success and words in message and message.endswith(FORMER)
    assert running.changed() == []
    assert running.send(named)[0]
    REFUSALS.append((f"tensors of a trainer: {what}", message))


@pytest.mark.parametrize("what", ["meta", "freed"])
def test_a_bucket_without_data(checkpoints: Checkpoints, start: Callable[..., Running], what: str) -> None:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    running, made = start(checkpoints.get(QWEN)[1]), FlattenedTensorBucket(list(sent(checkpoints).items()))
    packed = {"flattened_tensor": NO_DATA[what][0](made.get_flattened_tensor()), "metadata": made.get_metadata()}
    success, message = running.updater.update_weights_from_tensor(packed, load_format="flattened_bucket")
    assert not success and "tensor flattened_tensor has no data" in message and message.endswith(FORMER)
    assert running.changed() == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("vector", ["w13_weight_scale_2", "w13_input_scale", "w2_weight_scale_2", "w2_input_scale"])
def test_scales_that_no_conversion_writes(
    checkpoints: Checkpoints, start: Callable[..., Running], vector: str, bad: float
) -> None:
    named, running = sent(checkpoints), start(checkpoints.get(QWEN)[1])
    name = f"{LAST}.routed_experts.{vector}"
    named[name][3] = bad
    success, message = running.send(named)
    assert not success and f"tensor {name} has a value that is not a usable scale" in message
    assert f"found {bad}" in message and running.changed() == []


def test_input_scales_of_zero(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    named, running = sent(checkpoints), start(checkpoints.get(QWEN)[1])
    named[f"{LAST}.routed_experts.w2_input_scale"].fill_(0)
    success, message = running.send(named)
    assert not success and "all input scales of tensor" in message and running.changed() == []
    assert running.send(sent(checkpoints) | {name: named[name] * 0 for name in named if "2_weight_scale_2" in name})[0]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_different_scales_for_cutedsl(
    checkpoints: Checkpoints, start: Callable[..., Running], load_format: str
) -> None:
    """Dummy weights come from no file, so the layer's own name is not known."""
    _, served = checkpoints.get(QWEN, trtllm=True)
    _, other = checkpoints.get(replace(OTHER_BYTES, equal_gate_up=False), trtllm=True)
    running = start(served, backend="flashinfer_cutedsl", load_format=load_format)
    success, message = running.send(sent_from(other))
    assert not success and "this kernel takes one for both" in message and message.endswith(FORMER)
    assert running.changed() == []
    REFUSALS.append(("tensors of a trainer: gate/up scales differ, CuteDSL", message))


def test_different_scales_for_compressed_tensors(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    _, served = checkpoints.get(COMPRESSED_QWEN, trtllm=True)
    named, running = sent_from(served), start(served)
    named[UP][5] *= 2
    success, message = running.send(named)
    assert not success and "this kernel takes one for both" in message and message.endswith(FORMER)
    assert running.changed() == []


def test_different_scales_with_a_clamp_limit(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """Only for the layer that clamps, where it is known."""
    _, served = checkpoints.get(QWEN, trtllm=True)
    named = sent_from(checkpoints.get(replace(OTHER_BYTES, equal_gate_up=False), trtllm=True)[1])
    running = start(served)
    running.model.model.layers[1].mlp.experts.moe_runner_config.gemm1_clamp_limit = 7.0
    success, message = running.send(named)
    assert not success and "the model clamps both" in message and message.endswith(FORMER)
    assert running.changed() == []
    assert running.send({name: tensor for name, tensor in named.items() if LAST not in name})[0]


@pytest.mark.parametrize("way", ["tensors", "broadcast"])
def test_updates_that_sglang_itself_forbids(
    checkpoints: Checkpoints, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """It asks when it loads, which for experts alone is when they are written."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    experts = experts_alone(sent(checkpoints))
    running = start(checkpoints.get(QWEN)[1])
    with monkeypatch.context() as patch:
        patch.setattr(weight_updater, "_unsupported_derived_weight_cache_error", lambda *_: "a derived cache")
        assert running.send(experts, way) == (False, f"tensors for a running model: a derived cache. {FORMER}")
    with monkeypatch.context() as patch:
        patch.setattr(type(running.updater), "_assert_weight_cache_inactive", lambda *_: 1 / 0)
        success, message = running.send(experts, way)
    assert not success and "division by zero" in message and message.endswith(FORMER)
    assert running.changed() == []


def test_an_unknown_load_format(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    running = start(checkpoints.get(QWEN)[1])
    success, message = running.updater.update_weights_from_tensor([("model.norm.weight", torch.ones(256))], "fast")
    assert not success and "unknown load_format; expected direct, " in message and message.endswith(FORMER)
    assert running.changed() == []


def test_a_directory_whose_config_was_damaged(
    checkpoints: Checkpoints, start: Callable[..., Running], tmp_path: Path
) -> None:
    """It says which layers are a draft model's; asked after experts were written, it would end the server."""
    served = Path(shutil.copytree(checkpoints.get(QWEN)[1], tmp_path / "served"))
    running = start(served)
    (served / "config.json").write_text("{")
    success, message = running.send(sent(checkpoints))
    assert not success and f"{served / 'config.json'}: " in message and message.endswith(FORMER)
    assert running.changed() == []


NOBODYS = {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "nobody's"}


def test_a_broadcast_that_was_not_received(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    running = start(checkpoints.get(QWEN)[1])
    received = running.updater.receive_weights_from_distributed(**NOBODYS)
    success, message = running.updater.load_weights_from_distributed(received)
    assert not success and "Failed to receive weights: Group nobody's not in" in message and message.endswith(FORMER)
    assert running.changed() == []


def test_a_broadcast_that_a_stock_model_does_not_receive(
    checkpoints: Checkpoints, start: Callable[..., Running]
) -> None:
    """Itself, or as the draft of a prepared model that received for both."""
    updater = start(checkpoints.get(QWEN)[0], backend="flashinfer_trtllm").updater
    with pytest.raises(AssertionError, match="Group nobody's not in"):
        updater.receive_weights_from_distributed(**NOBODYS)
    assert updater.load_weights_from_distributed(NotReceived("nothing came")) == (False, "nothing came")


def test_scalars(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """SGLang takes ``[]`` and ``[1]`` for the same."""
    scalar = replace(QWEN, family="qwen3_moes", others={**QWEN.others, "model.scalar": (1,)})
    running = start(checkpoints.get(scalar)[1])
    assert running.send({"model.scalar": torch.tensor(1.0)})[0]
    assert "model.scalar ([2], not [1])" in running.send({"model.scalar": torch.ones(2)})[1]
