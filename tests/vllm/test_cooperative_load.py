"""--load-format nvfp4_prep with the tensor-parallel ranks of a host together: real vLLM, two processes, gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig

from nvfp4_prep.errors import ServingError
from nvfp4_prep.serving.cooperation import Alone
from nvfp4_prep.vllm import compat
from support.serving.compare import Job, Outcome
from support.serving.families import FAMILIES
from support.serving.results import Checkpoints
from support.serving.states import state_of

QWEN, DEEPSEEK = FAMILIES["qwen3_moe"], FAMILIES["deepseek_v3"]
TP2 = {"parallel": {"tensor_parallel_size": 2}}
pytestmark = pytest.mark.usefixtures("plugin")


def make_job(directories: tuple[Path, Path], options: dict[str, Any] | None = None, **extra: Any) -> Job:
    # Reads past the page cache would be counted with the pages around them, more than tiny tensors have.
    load = {"load_format": "nvfp4_prep", "model_loader_extra_config": {"threads": 2, "direct_io": "never", **extra}}
    return Job(*map(str, directories), options=options or TP2, prepared_load=load)


def experts_nbytes(prepared: Path) -> int:
    return sum(path.stat().st_size for path in prepared.glob("experts-layer-*.safetensors"))


def assert_equal(outcome: Outcome) -> None:
    assert outcome.unsupported is None
    assert outcome.differences == []
    assert outcome.layers and outcome.compared >= 14 * outcome.layers


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK], ids=lambda model: model.family)
@pytest.mark.parametrize("extra", [{}, {"verify": True}, {"exchange_nbytes": 1}], ids=str)
def test_the_ranks_read_the_file_once(checkpoints: Checkpoints, ranks: Any, model: Any, extra: dict[str, Any]) -> None:
    directories = checkpoints.get(model)
    # what is not experts every rank reads whole, by the same threads: it would be counted, too
    outcomes = ranks.run(make_job(directories, others="safetensors", **extra))
    for outcome in outcomes:
        assert_equal(outcome)
        assert outcome.prepared.exchanged == 2 * outcome.layers
    if "verify" not in extra:  # which reads rows of w13 on every rank
        assert 0.98 < sum(each.prepared.read_nbytes for each in outcomes) / experts_nbytes(directories[1]) <= 1.01


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        (TP2, {"cooperative": False}),
        ({"parallel": {"tensor_parallel_size": 2, "enable_expert_parallel": True}}, {}),
        ({"parallel": {"pipeline_parallel_size": 2}}, {}),
    ],
    ids=["switched off", "expert parallel", "pipeline parallel"],
)
def test_ranks_that_load_alone(
    checkpoints: Checkpoints, ranks: Any, options: dict[str, Any], extra: dict[str, Any]
) -> None:
    for outcome in ranks.run(make_job(checkpoints.get(DEEPSEEK), options, **extra)):
        assert_equal(outcome)
        assert outcome.prepared.exchanged == 0


@pytest.mark.parametrize("failing", ["cannot read", "fails before it exchanges"])
def test_one_rank_fails(checkpoints: Checkpoints, ranks: Any, failing: str) -> None:
    failed = ranks.run_to_failure(replace(make_job(checkpoints.get(QWEN)), failing=failing))
    for text in failed:
        assert text is not None
        assert "nvfp4_prep.errors.LoadError: rank 1 of 2 failed: " in text and "Input/output error" in text


def test_one_rank_is_killed(checkpoints: Checkpoints, mortal_ranks: Any) -> None:
    job = replace(make_job(checkpoints.get(QWEN)), failing="killed before it exchanges")
    survivor, killed = mortal_ranks.run_to_failure(job)
    assert killed is None and survivor is not None
    assert "nvfp4_prep.errors.LoadError: rank 1 of 2, which does not answer, did not take part" in survivor


@pytest.mark.parametrize(
    ("extra", "match"), [({"cooperative": 1}, "option cooperative"), ({"exchange_nbytes": 0}, "option exchange_nbytes")]
)
def test_unusable_options(checkpoints: Checkpoints, extra: dict[str, Any], match: str) -> None:
    load = {"load_format": "nvfp4_prep", "model_loader_extra_config": extra}
    with pytest.raises(ServingError, match=match):
        state_of(checkpoints.get(QWEN)[1], load=load)


def test_a_vllm_without_the_groups_loads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: SimpleNamespace(world_size=2))
    found = compat.tensor_parallel_ranks()
    assert found == Alone("this version of vLLM names no process groups of its tensor-parallel ranks")
    monkeypatch.delattr("vllm.distributed.parallel_state.get_tp_group")
    found = compat.tensor_parallel_ranks()
    assert isinstance(found, Alone) and "get_tp_group" in found.reason


def test_expert_parallel_ranks_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True, distributed_executor_backend="mp")
    config = SimpleNamespace(parallel_config=parallel)
    monkeypatch.setattr(compat, "get_current_vllm_config_or_none", lambda: config)
    found = compat.tensor_parallel_ranks()
    assert isinstance(found, Alone) and "expert parallelism" in found.reason
