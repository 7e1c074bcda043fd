"""A trainer's tensors for a running server (SGLang's own WeightUpdater): served to the last bit, or nothing changes."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_compare import failing_once
from sglang_models import COMPRESSED_MTP, MODELS, Checkpoints
from sglang_on_cpu import load_for_updates, load_model, make_server_args, meeting_point, rank_of
from sglang_results import REFUSALS
from sglang_states import differences, experts_state, snapshot, storage_of
from sglang_trainer import Named, experts_alone, others_alone, sent_from, serve, tensors_in, train
from test_sglang_arrivals import passing_over
from torch.multiprocessing import reductions

from nvfp4_prep.errors import ServingError
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.serving.stamp_tensor import STAMP_TENSOR

ATTENTION = {
    f"model.layers.{layer}.self_attn.{name}.weight": shape
    for layer in (0, 1)
    for name, shape in {"q_proj": (128, 256), "k_proj": (64, 256), "v_proj": (64, 256), "o_proj": (256, 128)}.items()
}
QWEN = replace(MODELS["qwen3_moe"], family="qwen3_moea", others={**MODELS["qwen3_moe"].others, **ATTENTION})
OTHER_BYTES = replace(QWEN, family="qwen3_moeb")
FIRST, LAST = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
FORMER = "The server goes on with the former weights."
pytestmark = pytest.mark.usefixtures("plugin")

Answer = tuple[bool, str]


class Running:
    """A server's model on one rank, and a trainer's ways to it."""

    def __init__(self, stack: ExitStack, directory: Path, *, backend: str = "auto", **load: Any) -> None:
        args = make_server_args(directory, moe_runner_backend=backend)
        stack.enter_context(rank_of(args))
        self.model, self.updater = load_for_updates(args, **load)
        self.first, self.storage = snapshot(self.model), storage_of(self.model)

    def send(self, named: Named, way: str = "tensors") -> Answer:
        """One update in a session of its own, as SGLang's scheduler runs it."""
        self.updater.begin_weight_update()
        answer: Answer = WAYS[way](self.updater, list(named.items()))
        self.updater.end_weight_update(run_post_load=False)
        return answer

    def changed(self) -> list[str]:
        return differences(self.first, snapshot(self.model))


def serialized(updater: Any, named: list[tuple[str, torch.Tensor]]) -> Answer:
    """As Engine.update_weights_from_tensor packs them, one entry a rank."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor
    from sglang.srt.utils import MultiprocessingSerializer

    # A server's process packs no tensors of the CPU: SGLang's patch of torch, made for those of a GPU, fails on them.
    ForkingPickler.register(torch.Tensor, getattr(reductions, "_reduce_tensor_original", reductions.reduce_tensor))
    packed = [(n, LocalSerializedTensor([MultiprocessingSerializer.serialize(t)])) for n, t in named]
    return updater.update_weights_from_tensor(packed)  # type: ignore[no-any-return]


def bucket(updater: Any, named: list[tuple[str, torch.Tensor]]) -> Answer:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    made = FlattenedTensorBucket(named_tensors=named)
    packed = {"flattened_tensor": made.get_flattened_tensor(), "metadata": made.get_metadata()}
    return updater.update_weights_from_tensor(packed, load_format="flattened_bucket")  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Any, list[tuple[str, torch.Tensor]]], Answer]] = {
    "tensors": lambda updater, named: updater.update_weights_from_tensor(named),
    "serialized": serialized,
    "bucket": bucket,
    "direct": lambda updater, named: updater.update_weights_from_tensor(named, "direct"),
    "custom": lambda updater, named: updater.update_weights_from_tensor(named, "test_sglang_tensor_updates.custom"),
    "broadcast": lambda updater, named: updater.load_weights_from_distributed(named),
}


def custom(model: Any, named: list[tuple[str, torch.Tensor]]) -> None:
    """A user's own loader (``--custom-weight-loader``)."""
    model.load_weights(named)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    with ExitStack() as stack:
        yield lambda directory, **options: Running(stack, directory, **options)


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
    assert WAYS[way](running.updater, list(sent_from(other).items()))[0]
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


def renamed(named: Named, old: str, new: str) -> Named:
    return {name.replace(old, new): tensor for name, tensor in named.items()}


def without(named: Named, words: str) -> Named:
    return {name: tensor for name, tensor in named.items() if words not in name}


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
    running.updater.custom_weight_loaders["test_sglang_tensor_updates.custom"] = True
    success, message = running.send(named, way)
    assert not success
    assert words in message and message.endswith(FORMER)
    assert running.changed() == []
    assert running.send(sent_from(checkpoints.get(OTHER_BYTES)[1]))[0]
    REFUSALS.append((f"tensors of a trainer: {what}", message))


def test_a_tensor_that_comes_twice_changes_nothing(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """Only the last one of a name would be compared with the served one; SGLang would load both."""
    named, running = sent(checkpoints), start(checkpoints.get(QWEN)[1])
    name = next(name for name in named if name.endswith("w13_weight"))
    success, message = WAYS["tensors"](running.updater, [(name, torch.zeros(3)), *named.items()])
    assert not success
    assert f"tensors of experts came twice; found {name}" in message and message.endswith(FORMER)
    assert running.changed() == []


@pytest.mark.parametrize("way", ["direct", "custom"])
def test_what_is_not_of_experts_by_other_loaders(
    checkpoints: Checkpoints, start: Callable[..., Running], way: str
) -> None:
    running = start(checkpoints.get(QWEN)[1])
    running.updater.custom_weight_loaders["test_sglang_tensor_updates.custom"] = True
    assert running.send({"model.norm.weight": torch.full((256,), 0.5)}, way)[0]
    assert running.changed() == ["model.norm.weight"]


def test_checkpoint_engine(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    running = start(checkpoints.get(QWEN)[1])
    success, message = running.updater.update_weights_from_ipc(SimpleNamespace(zmq_handles={}))
    assert not success and "cannot be checked before parameters are written" in message and message.endswith(FORMER)
    REFUSALS.append(("update_weights_from_ipc", message))


@pytest.mark.parametrize("way", ["tensors", "broadcast"])
def test_experts_that_fail_in_the_middle_end_the_server(
    checkpoints: Checkpoints, start: Callable[..., Running], way: str
) -> None:
    running = start(checkpoints.get(QWEN)[1])
    with failing_once(), pytest.raises(ServingError, match=r"failed in the middle.*Input/output error"):
        running.send(sent_from(checkpoints.get(OTHER_BYTES)[1]), way)


def test_other_tensors_that_sglang_fails_with(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """They come first: experts are not touched before SGLang took them."""
    plain = MODELS["qwen3_moe"]  # has no attention in its files, whose shapes could be compared
    running = start(checkpoints.get(plain)[1])
    _, other = checkpoints.get(replace(plain, family="qwen3_moex"))
    bad = {"model.layers.1.self_attn.q_proj.weight": torch.zeros(3, 3)}
    success, message = running.send(sent_from(other) | bad, "broadcast")
    assert not success and "partially updated" in message
    assert not any("/" in name for name in running.changed())


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


def test_layers_whose_experts_were_lost(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    """SGLang asks for single experts by the source's names when a rank is gone (elastic expert parallelism)."""
    running = start(checkpoints.get(QWEN)[1], backend="flashinfer_trtllm")
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


def test_names_that_nobody_knows(checkpoints: Checkpoints, start: Callable[..., Running], tmp_path: Path) -> None:
    """A directory that has the config alone, which is enough for dummy weights."""
    served, other = (checkpoints.get(model)[1] for model in (QWEN, OTHER_BYTES))
    shutil.copy(served / "config.json", tmp_path)
    running = start(tmp_path, load_format="dummy")
    success, message = running.send(sent_from(other))
    assert not success and "not loaded from local files" in message and running.changed() == []
    assert running.send(others_alone(sent_from(other)))[0]
    REFUSALS.append(("tensors of a trainer: names unknown", message))


def test_a_draft_model_gets_the_target_models_tensors_too(
    checkpoints: Checkpoints, start: Callable[..., Running]
) -> None:
    """SGLang hands one call to both; each takes its own layers."""
    served, other = (
        checkpoints.get(model, trtllm=True)[1]
        for model in (COMPRESSED_MTP, replace(COMPRESSED_MTP, family="other_mtp"))
    )
    named = sent_from(other)
    for draft in (True, False):
        args = make_server_args(other)
        with rank_of(args):
            expected = experts_state(load_model(args, draft=draft))
        args = make_server_args(served)
        with rank_of(args):
            model, updater = load_for_updates(args, draft=draft)
            before = experts_state(model)
            assert updater.update_weights_from_tensor(list(named.items()))[0]
            assert differences(expected, experts_state(model)) == [] != differences(before, expected)
            success, message = updater.update_weights_from_tensor(list(without(named, "scale_2").items()))
            assert not success and message.endswith("goes on with the former weights.")
            assert message.rpartition("The ")[2].startswith("draft model" if draft else "server")


def test_a_draft_model_of_its_own_directory(checkpoints: Checkpoints) -> None:
    """It passes the target model's layers over, which are not in its files."""
    _, served = checkpoints.get(COMPRESSED_MTP, trtllm=True)
    named = renamed(experts_alone(sent_from(served)), "model.layers.", "model.layers.7")
    args = make_server_args(served)
    with rank_of(args):
        model, updater = load_for_updates(args, draft=True)
        before = snapshot(model)
        assert updater.update_weights_from_tensor(list(named.items()))[0]
        assert differences(before, snapshot(model)) == []


def test_stock_checkpoints_are_updated_as_ever(checkpoints: Checkpoints, start: Callable[..., Running]) -> None:
    running = start(checkpoints.get(QWEN)[0], backend="flashinfer_trtllm")
    named = {"model.norm.weight": torch.full((256,), 0.5), f"{LAST}.nothing": torch.zeros(1)}
    for way in ("tensors", "broadcast"):
        assert WAYS[way](running.updater, list(named.items()))[0]
    success, message = running.updater.update_weights_from_ipc(SimpleNamespace(zmq_handles={}))
    assert not success and "nvfp4" not in message


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_broadcast_to_two_ranks(checkpoints: Checkpoints, ranks_of: Callable[[int], Any]) -> None:
    """One tensor after another, and in SGLang's bucket: gloo has no float8 of its own."""
    served, other = (str(checkpoints.get(model, trtllm=True)[1]) for model in (QWEN, OTHER_BYTES))
    meetings, port = (meeting_point(), meeting_point()), free_port()
    selections = [[name, name] for name in ("others", "torn", "others", "all")]
    received = ranks_of(3).each(
        [
            *(partial(serve, rank, meetings, served, other, selections, port, tp_size=2) for rank in (0, 1)),
            partial(train, other, selections, port),
        ]
    )
    for outcome in received[:2]:
        assert [success for success, _ in outcome.answers] == [True, False, True, True]
        assert "without some of its tensors" in outcome.answers[1][1]
        assert (outcome.changed, outcome.differences) == ([True, False, False, True], [])


@pytest.mark.parametrize("options", [{"tp_size": 2, "ep_size": 2}, {"pp_size": 2}], ids=["TP2 with EP2", "PP2"])
def test_each_ranks_own_tensors(checkpoints: Checkpoints, ranks: Any, options: dict[str, int]) -> None:
    """A stage has one layer, and refuses what the other stage would: nobody asks it, and SGLang tells the first's."""
    served, other = (str(checkpoints.get(model, trtllm=True)[1]) for model in (QWEN, OTHER_BYTES))
    torn = ["all", "torn"] if "tp_size" in options else ["torn", "torn"]
    meetings, selections = (meeting_point(), meeting_point()), [torn, ["others", "others"], ["all", "all"]]
    received = ranks.each([partial(serve, rank, meetings, served, other, selections, 0, **options) for rank in (0, 1)])
    for outcome in received:
        assert [success for success, _ in outcome.answers] == [False, True, True]
        assert outcome.answers[0][1].startswith("Rank 1 of 2: " if "tp_size" in options else "tensors for a")
        assert (outcome.changed, outcome.differences) == ([False, True, True], [])
