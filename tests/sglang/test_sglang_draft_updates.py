"""A trainer's tensors for a draft model and its target: SGLang gives one call to both, and each takes its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_models import COMPRESSED_MTP, COMPRESSED_QWEN, DRAFTED, MODELS, Checkpoints, Model
from sglang_on_cpu import load_for_updates, load_model, make_server_args, meeting_point, rank_of
from sglang_running import renamed, without
from sglang_states import differences, experts_state, snapshot
from sglang_trainer import (
    SCHEDULED,
    experts_alone,
    layer,
    sent_from,
    serve_draft,
    serve_draft_on_the_last_stage,
)

from nvfp4_prep.sglang.sources import served_by_any, serves_prepared

pytestmark = pytest.mark.usefixtures("plugin")


EXPERTS = {
    f"model.layers.3.mlp.experts.{expert}.{name}_proj.weight": shape
    for expert in range(8)
    for name, shape in {"gate": (128, 256), "up": (128, 256), "down": (256, 128)}.items()
}
BFLOAT16 = replace(
    DRAFTED["deepseek_v3"],
    family="deepseek_v3_mtp_bfloat16",
    layers=(1, 2),
    others={**DRAFTED["deepseek_v3"].others, **EXPERTS},
    ignore=(*DRAFTED["deepseek_v3"].ignore, "*layers.3*"),
)
"""The experts of its draft layer are not quantized, as ModelOpt leaves them."""


def states_of(directory: Path) -> dict[bool, dict[str, Any]]:
    """Experts of a checkpoint's target and draft model."""
    args = make_server_args(directory)
    with rank_of(args):
        return {draft: experts_state(load_model(args, draft=draft)) for draft in (False, True)}


@pytest.mark.parametrize("tiny", [COMPRESSED_MTP, BFLOAT16], ids=["prepared", "bfloat16"])
def test_a_draft_model_gets_the_target_models_tensors_too(checkpoints: Checkpoints, tiny: Model) -> None:
    """SGLang hands one call to both; each takes its own layers, which are in one directory."""
    served, other = (checkpoints.get(model, trtllm=True)[1] for model in (tiny, replace(tiny, family="other_mtp")))
    expected, named, args = states_of(other), sent_from(other), make_server_args(served)
    with rank_of(args):
        running = {draft: load_for_updates(args, draft=draft) for draft in (False, True)}
        for draft, (model, updater) in running.items():
            before = experts_state(model)
            updater.begin_weight_update()  # of the session, in which SGLang arranges its own experts anew
            assert updater.update_weights_from_tensor(list(named.items()))[0]
            updater.end_weight_update(run_post_load=False)
            assert differences(expected[draft], experts_state(model)) == [] != differences(before, expected[draft])
            success, message = updater.update_weights_from_tensor(list(without(named, "scale_2").items()))
            assert not success and message.endswith("goes on with the former weights.")
            assert message.rpartition("The ")[2].startswith("draft model" if draft else "server")


@pytest.fixture
def both(plugin: None, checkpoints: Checkpoints) -> Iterator[dict[str, tuple[Any, Any]]]:
    """A target and a draft model of another directory in one process, each with what updates it."""
    target, draft = (checkpoints.get(model, trtllm=True)[1] for model in (COMPRESSED_QWEN, COMPRESSED_MTP))
    args = make_server_args(target)
    with rank_of(args):
        loaded = load_for_updates(args)
        yield {"target": loaded, "draft": load_for_updates(args, draft=True, directory=draft)}


TARGETS, DRAFTS = 0, 3
"""Layers that only the one of both has."""


def test_a_draft_model_of_its_own_directory(checkpoints: Checkpoints, both: dict[str, tuple[Any, Any]]) -> None:
    """Each passes over what only the other one has, and takes its own of the same call."""
    of_target = experts_alone(
        layer(sent_from(checkpoints.get(replace(COMPRESSED_QWEN, family="other_qwen"), trtllm=True)[1]), TARGETS)
    )
    of_draft = experts_alone(
        layer(sent_from(checkpoints.get(replace(COMPRESSED_MTP, family="other_mtp"), trtllm=True)[1]), DRAFTS)
    )
    for role, (model, updater) in both.items():
        other = of_draft if role == "target" else of_target
        before = snapshot(model)
        assert updater.update_weights_from_tensor(list(other.items())) == (True, "Success")
        assert differences(before, snapshot(model)) == []
        assert updater.update_weights_from_tensor(list((of_target | of_draft).items()))[0]
        assert differences(before, snapshot(model))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_names_that_neither_has(checkpoints: Checkpoints, both: dict[str, tuple[Any, Any]], role: str) -> None:
    """Also one of a server before, whose models are gone."""
    served = checkpoints.get(COMPRESSED_QWEN, trtllm=True)[1]
    named = experts_alone(layer(sent_from(served), TARGETS))
    model, updater = both[role]
    before = snapshot(model)
    unknown = {
        "prepared": renamed(named, "layers.0.", "layers.7."),
        "single": {"model.layers.7.mlp.experts.0.up_proj.weight": torch.zeros(1)},
    }
    for found in unknown.values():
        success, message = updater.update_weights_from_tensor(list((named | found).items()))
        assert not success and "tensors of experts came that the served checkpoint does not have" in message
        assert "found model.layers.7.mlp.experts." in message
    assert differences(before, snapshot(model)) == []


@pytest.mark.usefixtures("both")
def test_a_server_knows_its_own_models_alone(checkpoints: Checkpoints) -> None:
    from sglang.srt.runtime_context import get_context

    assert {TARGETS, DRAFTS} <= {
        number for number in range(8) for name in served_by_any() if f"layers.{number}." in name
    }
    assert serves_prepared()
    get_context().set_server_args(make_server_args(checkpoints.get(COMPRESSED_QWEN, trtllm=True)[1]))
    assert (served_by_any(), serves_prepared()) == (frozenset(), False)


def test_what_a_draft_model_refuses_its_target_may_have_taken(
    checkpoints: Checkpoints, both: dict[str, tuple[Any, Any]]
) -> None:
    """So its answer speaks of itself alone."""
    directory = str(checkpoints.get(COMPRESSED_QWEN, trtllm=True)[1])
    model, updater = both["draft"]
    before = snapshot(model)
    success, message = updater.update_weights_from_disk(directory, "auto")
    assert not success and message.endswith(". The draft model goes on with the former weights.")
    assert differences(before, snapshot(model)) == []


def test_a_stock_target_that_fails_on_one_rank(checkpoints: Checkpoints, ranks: Any) -> None:
    """The draft model's ranks do not wait for one whose target did not take the call."""
    target, draft = checkpoints.get(MODELS["qwen3_moe"])[0], checkpoints.get(COMPRESSED_MTP, trtllm=True)[1]
    options = {"tp_size": 2, "ep_size": 2, "moe_runner_backend": "flashinfer_trtllm"}
    serve = partial(serve_draft, meeting=meeting_point(), target=str(target), draft=str(draft), **options)
    first, second = ranks.each([partial(serve, rank) for rank in (0, 1)])
    assert list(first) == list(second) == list(SCHEDULED)
    for way, (success, message) in first.items():
        assert not success and message.startswith("Rank 1 of 2: "), way
        assert second[way] == (f"ends: {message.partition('Error: ')[2]}" if way == "tensors" else (success, message))


def test_a_draft_model_on_the_last_stage_alone(checkpoints: Checkpoints, ranks: Any) -> None:
    """The stages before know its names: otherwise they would refuse what the last one takes."""
    target, draft = (checkpoints.get(tiny, trtllm=True)[1] for tiny in (COMPRESSED_QWEN, COMPRESSED_MTP))
    sent = {
        str(checkpoints.get(replace(tiny, family=family), trtllm=True)[1]): number
        for tiny, family, number in (
            (COMPRESSED_QWEN, "other_qwen", TARGETS),
            (COMPRESSED_MTP, "other_mtp", DRAFTS),
        )
    }
    serve = partial(
        serve_draft_on_the_last_stage, meeting=meeting_point(), target=str(target), draft=str(draft), sent=sent
    )
    (answers, changed), (last_answers, last_changed) = ranks.each([partial(serve, rank) for rank in (0, 1)])
    assert (answers, last_answers) == ([(True, "Success")], [(True, "Success")] * 2)
    assert {name.partition("/")[0] for name in changed} == {"model.layers.0.mlp.experts"}
    assert {name.partition("/")[0] for name in last_changed} == {"model.decoder.mlp.experts"}
