"""Runs cases, and checks what must hold for any input."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from random import Random

from faults.fork_client import Outcome
from faults.scenarios import World
from faults.trees import Tree, difference, tree_of, without_work
from fuzz.areas import AREAS, Case, Step

DOCUMENTED = (0, 2, 3, 4, 5, 6, 7, 8, 11, 12)
"""Exit codes that a command may end with here; 1 is an unexpected failure, and there is no Hub and no Ctrl-C."""
SECONDS = 30
"""A command that takes longer hangs."""
GROWTH_NBYTES = 700 * 2**20
"""Memory above the server's own that a command may take, whatever it is given."""


@dataclass(frozen=True)
class Finding:
    """One thing that a case showed to be wrong."""

    case: str
    area: str
    told: tuple[str, ...]
    command: str
    text: str

    def __str__(self) -> str:
        return f"SEED={self.case} ({self.area}; {'; '.join(self.told)})\n  {self.command}: {self.text}"


class Fuzzer:
    """Makes and runs cases in one world."""

    def __init__(self, world: World) -> None:
        """Remember the world; cases lie in a folder in it, because faults count below its root."""
        self._world = world

    def run(self, name: str) -> list[Finding]:
        """Run the case of this name, ``SEED:NUMBER``; the same name gives the same case."""
        chance = Random(name)
        area = chance.choice(list(AREAS))
        folder = self._world.root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        for sentinel in ("neighbour/config.json", "neighbour/model.safetensors", "elsewhere/precious.json"):
            (folder / sentinel).parent.mkdir(parents=True, exist_ok=True)
            (folder / sentinel).write_text("{}")
        case = Case(folder, chance)
        steps = AREAS[area](case, self._world)
        findings = []
        accepted = False
        for step in steps:
            if step.only_after_success and not accepted:
                continue
            outcome, texts = self._step(case, step)
            accepted = outcome.code == 0 if step is steps[0] else accepted
            findings += [Finding(name, area, tuple(case.told), step.command, text) for text in texts]
        return findings

    def _step(self, case: Case, step: Step) -> tuple[Outcome, list[str]]:
        places = {name: str(case.folder / name) for name in ("given", "out", "back", "other")}
        places |= {name: str(self._world.root / name) for name in ("source", "prepared")}
        program, words = "cli", [word.format(**places) for word in step.command.split(" ")]
        if words[0].startswith("@"):
            program = words.pop(0)[1:]
        targets = ["out", "back", "other", *(["given"] if step.in_place else [])]
        before = self._surroundings(case, targets)
        guard = [places[name] for name in targets]
        outcome = self._world.server.run(words, program=program, guard=guard, seconds=SECONDS)
        texts = self._wrong(outcome, step, "--json" in words)
        if outcome.code == 0 and step.result is not None:
            found = without_work(tree_of(case.out))
            if found != step.result:
                texts.append(f"exit code 0, but the result is another one: {difference(found, step.result)}")
        after = self._surroundings(case, targets)
        if after != before:
            texts.append(f"changed what is not its own: {difference(after, before)}")
        return outcome, texts

    def _surroundings(self, case: Case, targets: list[str]) -> Tree:
        tree = tree_of(self._world.root)
        return {
            name: content
            for name, content in tree.items()
            if not any((name + "/").startswith(f"case/{target}/") for target in targets)
        }

    def _wrong(self, outcome: Outcome, step: Step, as_json: bool) -> list[str]:
        found = []
        printed = outcome.stdout + outcome.stderr
        if outcome.code == -14:
            found.append(f"hangs: {outcome}")
        elif outcome.code not in DOCUMENTED:
            found.append(f"undocumented {outcome}")
        elif step.codes and outcome.code not in step.codes:
            found.append(f"was accepted before, and is refused now: {outcome}")
        if b"Traceback" in printed:
            found.append(f"traceback: {outcome}")
        if b"\x1b" in printed:
            found.append(f"a terminal escape was printed: {outcome.stdout[-300:]!r} {outcome.stderr[-300:]!r}")
        if outcome.outside:
            found.append(f"tried to change files elsewhere: {', '.join(outcome.outside[:5])}")
        if outcome.max_rss_nbytes - self._world.server.rss_nbytes > GROWTH_NBYTES:
            found.append(f"took {outcome.max_rss_nbytes / 1e9:.1f} GB of memory")
        if as_json and outcome.code in DOCUMENTED and not _is_one_object(outcome.stdout):
            found.append(f"--json printed no JSON object: {outcome}")
        return found


def _is_one_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
