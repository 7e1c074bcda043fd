"""Updates of a running server's weights (SGLang's own WeightUpdater): the new ones, or the former to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_compare import RAW_SCALES, Job, failing_once
from sglang_models import MODELS, Checkpoints
from sglang_on_cpu import load_for_updates, make_server_args, meeting_point, rank_of
from sglang_results import REFUSALS
from sglang_states import differences, snapshot
from sglang_trainer import update_from_disk

from nvfp4_prep.errors import ServingError
from nvfp4_prep.sglang.updates import begin_reading, update_or_restore

CUTEDSL, TRTLLM = "flashinfer_cutedsl", "flashinfer_trtllm"
QWEN = MODELS["qwen3_moe"]
OTHER_BYTES = replace(QWEN, family="qwen3_moex")
MORE_LAYERS = replace(QWEN, layers=(0, 1, 2), config={**QWEN.config, "num_hidden_layers": 3})
INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("plugin")

Edit = Callable[[Path], object]


def truncate(directory: Path) -> None:
    file = directory / "experts-layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def forget_the_last_layer(directory: Path) -> None:
    """Neither a file nor the index has it any more."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if file != "experts-layer-00001.safetensors"
    }
    (directory / INDEX).write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Edit, str]] = {
    "truncated file": (truncate, "file size does not match its header"),
    "missing file": (lambda directory: (directory / "experts-layer-00001.safetensors").unlink(), "missing from"),
    "missing layer": (forget_the_last_layer, "another model than the served one: it does not have model.layers.1."),
    "damaged stamp": (lambda directory: (directory / "config.json").write_text("{}"), "no stamp of nvfp4-prep"),
    "unreadable config": (lambda directory: (directory / "config.json").write_text("{"), "config.json"),
}


@pytest.fixture
def target(checkpoints: Checkpoints, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """What the server is told to load, and what it answers."""
    what: str = request.param
    if what in DAMAGES:
        edit, words = DAMAGES[what]
        directory = Path(shutil.copytree(checkpoints.get(OTHER_BYTES, trtllm=True)[1], tmp_path / "new"))
        edit(directory)
        return directory, words
    return {
        "source": lambda: (checkpoints.get(QWEN, trtllm=True)[0], "no stamp of nvfp4-prep"),
        "other layout": lambda: (checkpoints.get(QWEN)[1], "weights of another layout than the served one"),
        "other model": lambda: (checkpoints.get(MORE_LAYERS, trtllm=True)[1], "it has besides model.layers.2."),
        "other sizes": lambda: (
            checkpoints.get(OTHER_BYTES.with_sizes(4, 256, 192), trtllm=True)[1],
            "another model than the served one",
        ),
        "nothing": lambda: (tmp_path, "Cannot find any model weights"),
    }[what]()


@pytest.mark.parametrize(
    "target", [*DAMAGES, "source", "other layout", "other model", "other sizes", "nothing"], indirect=True
)
def test_what_must_not_be_served_changes_nothing(
    checkpoints: Checkpoints, target: tuple[Path, str], request: pytest.FixtureRequest
) -> None:
    """The server lives, holds its bytes and takes the next update."""
    directory, words = target
    _, prepared = checkpoints.get(QWEN, trtllm=True)
    _, other = checkpoints.get(OTHER_BYTES, trtllm=True)
    args = make_server_args(prepared)
    with rank_of(args):
        model, updater = load_for_updates(args)
        first = snapshot(model)
        success, message = updater.update_weights_from_disk(str(directory), "auto")
        assert not success
        assert words in message and message.endswith("The server goes on with the former weights.")
        assert differences(first, snapshot(model)) == []
        assert updater.model_config.model_path == str(prepared)
        assert updater.update_weights_from_disk(str(other), "auto")[0]
        assert any(name.endswith("w13_weight") for name in differences(first, snapshot(model)))
    REFUSALS.append((f"update from: {request.node.callspec.params['target']}", message))


@pytest.mark.parametrize("load_format", ["auto", "nvfp4_prep"])
@pytest.mark.parametrize("trtllm", [False, True], ids=["cutedsl", "trtllm"])
def test_a_failure_in_the_middle_brings_the_former_weights_back(
    checkpoints: Checkpoints, trtllm: bool, load_format: str
) -> None:
    """SGLang alone reads the new directory once more, serves it if that succeeds, and calls it a failure."""
    _, prepared = checkpoints.get(QWEN, trtllm=trtllm)
    _, other = checkpoints.get(OTHER_BYTES, trtllm=trtllm)
    args = make_server_args(prepared)
    with rank_of(args):
        model, updater = load_for_updates(args, load_format=load_format)
        first = snapshot(model)
        with failing_once():
            success, message = updater.update_weights_from_disk(str(other), load_format)
        assert not success
        assert "Input/output error" in message and "Rolling back" not in message  # it would read the new one again
        assert message.endswith("The server goes on with the former weights, which were loaded again.")
        assert differences(first, snapshot(model)) == []
        assert updater.model_config.model_path == str(prepared)
        assert updater.update_weights_from_disk(str(other), load_format) == (
            True,
            "Succeeded to update model weights.",
        )
    REFUSALS.append(("update: a file cannot be read", message))


def test_former_weights_that_are_gone_end_the_server(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """What is raised here ends SGLang's scheduler, and with it the server."""
    prepared = Path(shutil.copytree(checkpoints.get(QWEN, trtllm=True)[1], tmp_path / "former"))
    _, other = checkpoints.get(OTHER_BYTES, trtllm=True)
    args = make_server_args(prepared)
    with rank_of(args):
        _, updater = load_for_updates(args)
        shutil.rmtree(prepared)
        with failing_once(), pytest.raises(ServingError, match="cannot be loaded again") as caught:
            updater.update_weights_from_disk(str(other), "auto")
    assert "Input/output error" in str(caught.value)
    REFUSALS.append(("update: the former directory is gone", str(caught.value)))


def test_an_answer_after_parameters_were_written(checkpoints: Checkpoints) -> None:
    """SGLang may answer, and not raise, in the middle: that is none of its refusals, which leave the weights."""
    _, prepared = checkpoints.get(QWEN, trtllm=True)

    def original(updater: Any, path: str) -> tuple[bool, str]:
        begin_reading(SimpleNamespace(model_config=updater.model_config, model_or_path=path))
        return False, "half of it"

    args = make_server_args(prepared)
    with rank_of(args):
        _, updater = load_for_updates(args)
        with pytest.raises(ServingError, match="cannot be loaded again: half of it"):
            update_or_restore(original, updater, "elsewhere")


def test_what_came_of_a_failed_load_does_not_count(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files whose headers cannot be compared (object stores) may lack what came in the load before."""
    _, prepared = checkpoints.get(QWEN, trtllm=True)
    lacking = Path(shutil.copytree(prepared, tmp_path / "lacking"))
    forget_the_last_layer(lacking)
    monkeypatch.setattr("nvfp4_prep.sglang.sources.check_same_tensors", lambda *_: None)
    args = make_server_args(prepared)
    with rank_of(args):
        model, updater = load_for_updates(args)
        first = snapshot(model)
        weights = model.model.layers[1].mlp.experts.nvfp4_prep
        weights.arrived.update(weights.names)
        success, message = updater.update_weights_from_disk(str(lacking), "auto")
        assert not success and "did not arrive" in message
        assert differences(first, snapshot(model)) == []


def test_what_sglang_does_not_do_is_answered(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang raises where its cache of weights forbids updates; nothing was read, so nothing has to be loaded again."""
    _, prepared = checkpoints.get(QWEN, trtllm=True)
    args = make_server_args(prepared)
    with rank_of(args):
        model, updater = load_for_updates(args)
        first = snapshot(model)
        monkeypatch.setattr(type(updater), "_assert_weight_cache_inactive", lambda *_: 1 / 0)
        assert updater.update_weights_from_disk(str(prepared), "auto") == (
            False,
            "division by zero. The server goes on with the former weights.",
        )
        assert differences(first, snapshot(model)) == []


def update_job(checkpoints: Checkpoints, parallel: dict[str, Any]) -> Job:
    source, prepared = checkpoints.get(replace(QWEN, one_input_scale=True), trtllm=True)
    _, other = checkpoints.get(replace(OTHER_BYTES, one_input_scale=True), trtllm=True)
    return Job(str(source), str(prepared), TRTLLM, options=parallel, left_out=RAW_SCALES, update=str(other))


def test_one_rank_that_fails_takes_all_back(checkpoints: Checkpoints, ranks: Any) -> None:
    """Rank 0 had the new weights already."""
    for outcome in ranks.run(update_job(checkpoints, {"tp_size": 2})):
        assert (outcome.unsupported, outcome.differences) == (None, [])
        assert outcome.answer is not None and not outcome.answer[0]
        assert outcome.answer[1].startswith("Rank 1 of 2: ") and "Input/output error" in outcome.answer[1]


def test_the_worst_of_all_ranks_is_answered(checkpoints: Checkpoints, ranks: Any, tmp_path: Path) -> None:
    """Rank 0 refuses what it finds, and rank 1 fails in the middle."""
    served, other = (checkpoints.get(model, trtllm=True)[1] for model in (QWEN, OTHER_BYTES))
    damaged = Path(shutil.copytree(other, tmp_path / "damaged"))
    truncate(damaged)
    update = partial(update_from_disk, meeting=meeting_point(), served=str(served), tp_size=2)
    answers = ranks.each(
        [partial(update, 0, directory=str(damaged), failures=0), partial(update, 1, directory=str(other), failures=1)]
    )
    for (success, message), changed in answers:
        assert not success and message.startswith("Rank 1 of 2: ") and "Input/output error" in message
        assert message.endswith("with the former weights, which were loaded again.")
        assert changed == []


def test_former_weights_that_one_rank_cannot_load_end_all(checkpoints: Checkpoints, ranks: Any) -> None:
    served, other = (str(checkpoints.get(model, trtllm=True)[1]) for model in (QWEN, OTHER_BYTES))
    update = partial(update_from_disk, meeting=meeting_point(), served=served, directory=other, tp_size=2)
    with pytest.raises(RuntimeError) as caught:
        ranks.each([partial(update, 0, failures=0), partial(update, 1, failures=2)])
    assert str(caught.value).count("the former ones cannot be loaded again: Rank 1 of 2: [Errno 5]") == 2


def test_a_pipeline_stage_that_fails_ends_the_server(checkpoints: Checkpoints, ranks: Any) -> None:
    """Stages update one after the other: the ones before may hold the new weights, and nobody can ask them."""
    with pytest.raises(RuntimeError, match="other pipeline stages may hold the new weights") as caught:
        ranks.run(update_job(checkpoints, {"pp_size": 2}))
    assert "rank 1: " in str(caught.value) and "rank 0: " not in str(caught.value)


def test_stock_checkpoints_are_updated_as_ever(checkpoints: Checkpoints) -> None:
    source, _ = checkpoints.get(QWEN)
    other, _ = checkpoints.get(MORE_LAYERS)
    args = make_server_args(source, moe_runner_backend=TRTLLM)
    with rank_of(args):
        _, updater = load_for_updates(args)
        assert updater.update_weights_from_disk(str(other), "auto")[0]
        assert updater.model_config.model_path == str(other)
