"""Commands that the fault suite disturbs, and the world that they work in.

A world is a folder that one fork server works in, one command at a time::

    world/source      a tiny checkpoint; never changed
    world/prepared    the source, prepared; never changed
    world/neighbour   files of somebody else; never changed
    world/out         what the command writes; new for every point
    world/hf-home     the Hub client's own files, where there is a Hub
"""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults.fork_client import Fault, ForkServer, Outcome
from faults.trees import Tree, tree_of
from nvfp4_prep import SampleModel, convert, write_sample
from nvfp4_prep.output.report_file import REPORT_MARKER

MODEL = SampleModel(layers=3, experts=2, intermediate=32, hidden=64, vocabulary=16, shard_nbytes=40_000, seed=12)
"""Two MoE layers, because parts of a conversion are of layers; two shards."""
CHECKPOINT = ("config.json", "nvfp4_prep.json")


@dataclass(frozen=True)
class Scenario:
    """A command to disturb.

    Attributes:
        name: of the scenario.
        command: arguments, with ``{source}``, ``{prepared}`` and ``{out}``; ``@`` before another program than the
            command line.
        before: commands that make the state that the command begins with.
        killed_before: one more such command, which is killed half-way.
        after: commands that make something comparable of what the command wrote.
        whole: a directory that has all these files claims to be complete; none does where none are named.
        reports: files in ``out`` of which only beginning and end are looked at, because they tell times. ``out`` is
            there from the beginning then.
        only_new: the command writes only where nothing is. It removes what it wrote when it fails; after a kill it is
            refused until somebody removed that.
        in_place: begins with a copy of the prepared checkpoint, its config.json edited.
        short: whether the short form of the suite has it, too.
    """

    name: str
    command: str
    before: tuple[str, ...] = ()
    killed_before: str | None = None
    after: tuple[str, ...] = ()
    whole: tuple[str, ...] = CHECKPOINT
    reports: tuple[str, ...] = ()
    only_new: bool = False
    in_place: bool = False
    short: bool = True


_CONVERT = "convert {source} {out} -q --threads 1 --no-smoke"
_SMOKE = "verify {prepared} -q --threads 1 --smoke --layers 1 --sample 1 --backend torch --report {out}/page.html"
_SAMPLE = "sample {out} --layers 2 --experts 1 --intermediate 16 --hidden 32 --vocabulary 16 -q"
_RESTORE = "restore {prepared} {out} -q --threads 1"
_RELAYOUT = "relayout {prepared} {out} --gate-up-block 16 -q --threads 1"
_PARTS = (f"{_CONVERT} --layers 1/2", f"{_CONVERT} --layers 2/2")

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("convert", "convert {source} {out} -q --threads 1"),
        Scenario("resume", _CONVERT, killed_before=_CONVERT, short=False),
        Scenario("restart", "convert {source} {out} -q --threads 1 --restart", killed_before=_CONVERT),
        Scenario("part", _PARTS[0], after=(_PARTS[1], f"{_CONVERT} --join")),
        Scenario("join", "convert {source} {out} -q --threads 1 --join", before=_PARTS),
        Scenario("restore", _RESTORE, whole=("config.json",)),
        Scenario(
            "restore-restart", f"{_RESTORE} --restart", killed_before=_RESTORE, whole=("config.json",), short=False
        ),
        Scenario("relayout", _RELAYOUT),
        Scenario("sample", _SAMPLE, whole=(), only_new=True),
        Scenario("report", _SMOKE, whole=("page.html",), reports=("page.html",)),
        Scenario("report-again", _SMOKE, before=(_SMOKE,), whole=("page.html",), reports=("page.html",), short=False),
        Scenario("restamp", "restamp {out} -q", in_place=True),
    )
}


@dataclass(frozen=True)
class Action:
    """A way in which a call breaks: errno or 0 for SIGKILL, whether later calls break too, exit codes that may follow.

    Exit code 0 may follow an error too, where the call only prepared something that can be done without.
    """

    error: int
    for_good: bool
    codes: tuple[int, ...]


ACTIONS = {
    "kill": Action(0, False, (-9,)),
    "eio": Action(errno.EIO, False, (8, 0)),
    "enospc": Action(errno.ENOSPC, False, (5, 0)),
    "enospc-for-good": Action(errno.ENOSPC, True, (5, 0)),
}


class World:
    """One world and the server that works in it."""

    def __init__(self, root: Path, server: ForkServer) -> None:
        """Make the world's files."""
        self.root = root.resolve()
        self.server = server
        self.out = self.root / "out"
        self._references: dict[str, tuple[Tree, int]] = {}
        write_sample(self.root / "source", MODEL)
        convert(self.root / "source", self.root / "prepared")
        (self.root / "neighbour").mkdir()
        (self.root / "neighbour" / "config.json").write_text("{}")
        (self.root / "neighbour" / "model.safetensors").write_bytes(b"not to be touched")
        self._untouched = self._surroundings()

    def run(self, command: str, fault: Fault | None = None) -> Outcome:
        """Run a command of a scenario."""
        names = {name: str(self.root / name) for name in ("source", "prepared", "out")}
        program, words = "cli", [word.format(**names) for word in command.split(" ")]
        if words[0].startswith("@"):
            program = words.pop(0)[1:]
        return self.server.run(words, program=program, fault=fault)

    def run_well(self, command: str) -> None:
        """Run a command that must succeed."""
        outcome = self.run(command)
        assert outcome.code == 0, f"{command}: {outcome}"

    def fault(self, at: int, action: Action | None = None, trace: Path | None = None) -> Fault:
        """Return a fault at a point of the whole world."""
        error, for_good = (action.error, action.for_good) if action else (0, False)
        return Fault(str(self.root), at, error, for_good, None if trace is None else str(trace))

    def begin(self, scenario: Scenario) -> None:
        """Make the state that the scenario's command begins with."""
        self.clear()
        if scenario.reports:
            self.out.mkdir()
        if scenario.in_place:
            shutil.copytree(self.root / "prepared", self.out)
            config = json.loads((self.out / "config.json").read_text())
            (self.out / "config.json").write_text(json.dumps(config | {"rope_theta": 5000000}, indent=2) + "\n")
        for command in scenario.before:
            self.run_well(command)
        if scenario.killed_before is not None:
            half = self.reference(Scenario("", scenario.killed_before))[1] // 2
            assert self.run(scenario.killed_before, self.fault(half, ACTIONS["kill"])).code == -9

    def reference(self, scenario: Scenario) -> tuple[Tree, int]:
        """Return what an undisturbed run leaves in ``out``, and how many points its command has."""
        key = f"{scenario.name}: {scenario.command}"
        if key not in self._references:
            self.begin(scenario)
            outcome = self.run(scenario.command, self.fault(0))
            assert outcome.code == 0 and outcome.points > 0, str(outcome)
            for command in scenario.after:
                self.run_well(command)
            self._references[key] = self.left(scenario), outcome.points
            self.clear()
        return self._references[key]

    def left(self, scenario: Scenario) -> Tree:
        """Return what stands in ``out``, whole reports by that fact alone, without files that never got their name."""
        tree = tree_of(self.out)
        for name in scenario.reports:
            tree = {there: content for there, content in tree.items() if not there.startswith(".nvfp4-prep-report-")}
            text = (self.out / name).read_text() if name in tree else ""
            if text[:4096].find(REPORT_MARKER) >= 0 and text.rstrip().endswith("</html>"):
                tree[name] = "a whole report"
        return tree

    def trace(self, scenario: Scenario) -> list[str]:
        """Return the calls of the scenario's command, one line a point."""
        self.begin(scenario)
        path = self.root.parent / f"{self.root.name}.trace"
        self.run(scenario.command, self.fault(0, trace=path))
        return path.read_text().replace(str(self.root) + "/", "").splitlines()

    def clear(self) -> None:
        """Remove what the last command wrote."""
        shutil.rmtree(self.out, ignore_errors=True)

    def _surroundings(self) -> Tree:
        tree = tree_of(self.root)
        return {name: content for name, content in tree.items() if name.split("/")[0] not in ("out", "hf-home")}

    def touched(self) -> Tree | None:
        """Return what stands outside ``out`` if it is not what it was."""
        now = self._surroundings()
        return now if now != self._untouched else None

    @property
    def untouched(self) -> Tree:
        """What stands outside ``out``, from the beginning to the end."""
        return self._untouched
