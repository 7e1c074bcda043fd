"""Fault injection at every local call of the commands that publish: no commit is ever servable and incomplete.

The Hub is the loopback one of tests/hub, in a process of its own and empty before each point.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from faults.checks import short_points
from faults.fault_library import build_library
from faults.fork_client import ForkServer
from faults.hub_process import HubProcess
from faults.known_failures import finding_of
from faults.scenarios import ACTIONS, World
from faults.settings import EVERY_POINT, require_library, working_folder
from faults.trees import WORK_FOLDER, Tree, difference, tree_of, without_work

pytestmark = pytest.mark.slow

BRANCH = "alice/prepared main"
_CONVERT = "convert {source} {out} -q --threads 1 --no-smoke --push-to alice/prepared"
COMMANDS = {"convert-stream": f"{_CONVERT} --stream-out"} | ({"convert-push": _CONVERT} if EVERY_POINT else {})


@dataclass
class Publisher:
    """A world, its Hub, and what undisturbed runs of the commands leave in both."""

    world: World
    hub: HubProcess
    _references: dict[str, tuple[Tree, Tree, int]] = field(default_factory=dict)

    def begin(self) -> None:
        """Empty the Hub and the target."""
        self.hub.ask("empty")
        self.world.clear()

    def reference(self, command: str) -> tuple[Tree, Tree, int]:
        """Return the published files, the local files, and the number of points."""
        if command not in self._references:
            self.begin()
            outcome = self.world.run(command, self.world.fault(0))
            assert outcome.code == 0, str(outcome)
            state = self.hub.ask("look")
            assert state["half"] == [] and len(state["trees"][BRANCH]) > 4
            self._references[command] = state["trees"][BRANCH], tree_of(self.world.out), outcome.points
        return self._references[command]


@pytest.fixture(scope="module")
def publisher() -> Iterator[Publisher]:
    require_library()
    with ExitStack() as stack:
        folder = stack.enter_context(working_folder("hub-faults-"))
        hub = stack.enter_context(HubProcess())
        home = folder / "world" / "hf-home"
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_valid", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        server = stack.enter_context(ForkServer(folder / "scratch", build_library(folder), variables))
        yield Publisher(World(folder / "world", server), hub)


def _problems(publisher: Publisher, command: str, action_name: str, point: int) -> list[str]:
    action = ACTIONS[action_name]
    published, local, _ = publisher.reference(command)
    publisher.begin()
    outcome = publisher.world.run(command, publisher.world.fault(point, action))
    found = []
    if outcome.code not in ((*action.codes, 10) if outcome.broken else (0,)) or b"Traceback" in outcome.stderr:
        found.append(f"unexpected {outcome}")
    found += publisher.hub.ask("look")["half"]
    outcome = publisher.world.run(command)
    state: dict[str, Any] = publisher.hub.ask("look")
    found += state["half"]
    if outcome.code != 0:
        return [*found, f"the same command again: {outcome}"]
    if state["trees"][BRANCH] != published:
        found.append(f"published something else: {difference(state['trees'][BRANCH], published)}")
    left = tree_of(publisher.world.out)
    if without_work(left) != without_work(local) or (WORK_FOLDER in left) != (WORK_FOLDER in local):
        found.append(f"left something else here: {difference(left, local)}")
    if (now := publisher.world.touched()) is not None:
        found.append(f"changed files outside the target: {difference(now, publisher.world.untouched)}")
    return found


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_broken_call_while_publishing(publisher: Publisher, name: str, action: str) -> None:
    command = COMMANDS[name]
    points = publisher.reference(command)[2]
    chosen = list(range(1, points + 1)) if EVERY_POINT else short_points(points, action)[::3]
    problems = [
        f"{name}, {action} at call {point} of {points}: {text}"
        for point in chosen
        for text in _problems(publisher, command, action, point)
    ]
    new = [problem for problem in problems if finding_of(name, problem) is None]
    assert not new, f"{len(new)} problems:\n" + "\n".join(new[:40])
    if problems:
        pytest.xfail("; ".join(sorted({str(finding_of(name, problem)) for problem in problems})))


def test_push_changes_no_file_here(publisher: Publisher) -> None:
    """So there is no call to break: tests/hub breaks its requests."""
    assert publisher.reference("push {prepared} alice/prepared -q")[2] == 0
    assert publisher.world.touched() is None
