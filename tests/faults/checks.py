"""One point: break a command there, look at what is left, run the same command again, and look once more."""

from __future__ import annotations

from dataclasses import dataclass

from faults.fork_client import Outcome
from faults.scenarios import ACTIONS, Scenario, World
from faults.trees import WORK_FOLDER, Tree, difference, tree_of, without_work
from nvfp4_prep.errors import TargetError


@dataclass(frozen=True)
class Problem:
    """Something that must not be, at one point."""

    scenario: str
    action: str
    point: int
    points: int
    text: str

    def __str__(self) -> str:
        return f"{self.scenario}, {self.action} at call {self.point} of {self.points}: {self.text}"


def _claims_to_be_whole(scenario: Scenario, tree: Tree) -> bool:
    return scenario.whole != () and all(name in tree for name in scenario.whole)


def _check_what_is_left(scenario: Scenario, world: World, outcome: Outcome, reference: Tree) -> list[str]:
    """Nothing that is left may look whole and not be; nothing else may have changed."""
    found = []
    left = without_work(world.left(scenario))
    if scenario.only_new and outcome.code > 0 and left:
        found.append(f"files are left after an error: {', '.join(left)}")
    if scenario.in_place:
        begun = tree_of(world.root / "prepared")
        # a new manifest that was not renamed yet may stay
        left = {name: content for name, content in left.items() if not name.startswith(WORK_FOLDER)}
        changed = {name for name in left if left[name] != begun.get(name)} - {"config.json"}
        if left.keys() != begun.keys() or changed - {"nvfp4_prep.json"}:
            found.append(f"the checkpoint was damaged: {difference(left, reference)}")
        elif changed and left != reference:
            found.append("the manifest is neither the old nor the new one")
    elif _claims_to_be_whole(scenario, left) and left != reference:
        found.append(f"looks whole, and is not: {difference(left, reference)}")
    if outcome.code == 0 and not scenario.after and left != reference:
        found.append(f"exit code 0, but the result is another one: {difference(left, reference)}")
    if b"Traceback" in outcome.stderr:
        found.append(f"traceback: {outcome}")
    if (now := world.touched()) is not None:
        found.append(f"changed files outside the target: {difference(now, world.untouched)}")
    return found


def _check_again(scenario: Scenario, world: World, reference: Tree) -> list[str]:
    """The same command must complete, with the bytes of an undisturbed run, and tidy up."""
    if scenario.only_new and tree_of(world.out):
        outcome = world.run(scenario.command)
        if outcome.code != TargetError.exit_code:
            return [f"where something is, it should be refused: {outcome}"]
        world.clear()
    for command in (scenario.command, *scenario.after):
        outcome = world.run(command)
        if outcome.code != 0:
            again = "the same command again" if command == scenario.command else f"afterwards {command}"
            return [f"{again}: {outcome}"]
    found = []
    result = world.left(scenario)
    if WORK_FOLDER in result:
        found.append(f"{WORK_FOLDER} is left after the same command again")
    if without_work(result) != reference:
        found.append(f"another result after the same command again: {difference(without_work(result), reference)}")
    if (now := world.touched()) is not None:
        found.append(f"the same command again changed files elsewhere: {difference(now, world.untouched)}")
    return found


def check_point(world: World, scenario: Scenario, action_name: str, point: int) -> list[Problem]:
    """Break the scenario's command at one point, and return everything that is wrong afterwards."""
    action = ACTIONS[action_name]
    reference, points = world.reference(scenario)
    world.begin(scenario)
    outcome = world.run(scenario.command, world.fault(point, action))
    codes = action.codes if outcome.broken else (0,)
    texts = [] if outcome.code in codes else [f"expected exit code {' or '.join(map(str, codes))}, found {outcome}"]
    texts += _check_what_is_left(scenario, world, outcome, reference)
    texts += _check_again(scenario, world, reference)
    return [Problem(scenario.name, action_name, point, points, text) for text in texts]


def short_points(points: int, action_name: str) -> list[int]:
    """Return some points, others for each action: a few from all over the command, and some of the last five.

    A kill gets the first point and all of the last five.
    """
    share = list(ACTIONS).index(action_name)
    between = range(2 + share * points // 12, points - 4, max(1, points // 3))
    ends = {1, *range(points - 4, points + 1)} if action_name == "kill" else {points - 4 + share, points}
    return sorted({point for point in (*between, *ends) if point > 0})
