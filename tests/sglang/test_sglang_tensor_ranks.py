"""A trainer's tensors for several ranks: all of them take a call, or none does, whichever of them fails."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sglang_models import Checkpoints
from sglang_on_cpu import meeting_point
from sglang_running import OTHER_BYTES, QWEN
from sglang_trainer import serve, train

pytestmark = pytest.mark.usefixtures("plugin")


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


FAILURES = {
    "a layer less": "Rank 1 of 2 got other prepared tensors than rank 0. The server goes on",
    "unreadable": "Rank 1 of 2: tensors for a running model: an update cannot be unpacked or checked (AttributeError: ",
    "not received": "Rank 1 of 2: Failed to receive weights: Group nobody's not in",
    "others fail": ". No prepared experts were written. Of the other tensors some may be",
}


def test_a_rank_that_fails(checkpoints: Checkpoints, ranks: Any) -> None:
    """Whatever fails on one before experts are written, they are written on none; the next call finds all ranks."""
    served, other = (str(checkpoints.get(model, trtllm=True)[1]) for model in (QWEN, OTHER_BYTES))
    meetings, selections = (meeting_point(), meeting_point()), [*(["all", what] for what in FAILURES), ["all", "all"]]
    received = ranks.each([partial(serve, rank, meetings, served, other, selections, 0, tp_size=2) for rank in (0, 1)])
    for outcome in received:
        for (success, message), (what, words) in zip(outcome.answers[:-1], FAILURES.items(), strict=True):
            assert not success and message.startswith("Rank 1 of 2") and words in message, (what, message)
        assert outcome.answers[-1][0]
        assert outcome.changed[:3] == [False] * 3  # what is not of experts is loaded on rank 0 in the last
        assert outcome.experts_changed == [*(False for _ in FAILURES), True]
        assert outcome.differences == []
    assert received[0].answers == received[1].answers


def test_experts_that_fail_on_one_rank_end_all(checkpoints: Checkpoints, ranks: Any) -> None:
    """Rank 0 has written its share, and would answer that all went well."""
    served, other = (str(checkpoints.get(model, trtllm=True)[1]) for model in (QWEN, OTHER_BYTES))
    meetings, selections = (meeting_point(), meeting_point()), [["all", "experts fail"]]
    with pytest.raises(RuntimeError) as caught:
        ranks.each([partial(serve, rank, meetings, served, other, selections, 0, tp_size=2) for rank in (0, 1)])
    assert (
        str(caught.value).count("failed in the middle: Rank 1 of 2: [Errno 5] Input/output error. The server ends") == 2
    )
