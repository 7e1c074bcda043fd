"""Fault injection at every mutating system call of the commands: see README.md beside this file.

The short form breaks a few calls of each command; with NVFP4_PREP_FAULTS=all (``make test-faults``) every one.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from faults.checks import Problem, check_point, short_points
from faults.fault_library import build_library
from faults.fork_client import ForkServer
from faults.known_failures import finding_of
from faults.scenarios import ACTIONS, SCENARIOS, Scenario, World
from faults.settings import EVERY_POINT, SERVERS, require_library, working_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worlds() -> Iterator[list[World]]:
    """Worlds that work side by side."""
    require_library()
    with ExitStack() as stack:
        folder = stack.enter_context(working_folder("faults-"))
        library = build_library(folder)
        servers = [ForkServer(folder / f"scratch{number}", library) for number in range(SERVERS)]
        for server in servers:
            stack.enter_context(server)
        yield [World(folder / f"world{number}", server) for number, server in enumerate(servers)]


def check_points(worlds: list[World], scenario: Scenario, action: str, points: list[int]) -> list[Problem]:
    """Check points in all worlds side by side."""
    free: queue.SimpleQueue[World] = queue.SimpleQueue()
    for world in worlds:
        free.put(world)

    def check(point: int) -> list[Problem]:
        world = free.get()
        try:
            return check_point(world, scenario, action, point)
        finally:
            free.put(world)

    with ThreadPoolExecutor(len(worlds)) as pool:
        return [problem for problems in pool.map(check, points) for problem in problems]


CHOSEN = [scenario for scenario in SCENARIOS.values() if scenario.short or EVERY_POINT]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("scenario", CHOSEN, ids=[scenario.name for scenario in CHOSEN])
def test_a_broken_call(worlds: list[World], scenario: Scenario, action: str) -> None:
    points = worlds[0].reference(scenario)[1]
    chosen = list(range(1, points + 1)) if EVERY_POINT else short_points(points, action)
    problems = check_points(worlds, scenario, action, chosen)
    new = [str(problem) for problem in problems if finding_of(scenario.name, str(problem)) is None]
    assert not new, f"{len(new)} problems:\n" + "\n".join(new[:40])
    if problems:
        pytest.xfail("; ".join(sorted({str(finding_of(scenario.name, str(problem))) for problem in problems})))


@pytest.mark.parametrize(
    ("action", "point", "text"),
    [("kill", 8, "looks whole, and is not: missing: "), ("enospc", 8, "exit code 0, but the result is another one")],
)
def test_a_careless_program_is_found_out(worlds: list[World], action: str, point: int, text: str) -> None:
    problems = check_point(worlds[0], Scenario("careless", "@careless {prepared} {out}"), action, point)
    assert any(text in problem.text for problem in problems), problems
