"""What is fuzzed: an area makes the files of a case, damages them, and names the commands to run on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from faults.scenarios import ACTIONS, Scenario, World
from faults.trees import Tree
from fuzz import hostile_files
from fuzz.hostile_json import damaged_json


@dataclass(frozen=True)
class Step:
    """One command of a case.

    Attributes:
        command: arguments; ``{given}`` is the damaged directory, ``{out}``, ``{back}`` are targets.
        only_after_success: run only if the first command of the case succeeded.
        codes: exit codes that are right; all documented ones if empty.
        result: what ``{out}`` must hold after success.
        in_place: the command may write into the damaged directory.
    """

    command: str
    only_after_success: bool = False
    codes: tuple[int, ...] = ()
    result: Tree | None = None
    in_place: bool = False


@dataclass
class Case:
    """One case in the making."""

    folder: Path
    chance: Random
    told: list[str] = field(default_factory=list)

    @property
    def given(self) -> Path:
        """The damaged directory."""
        return self.folder / "given"

    @property
    def out(self) -> Path:
        """The target of the commands."""
        return self.folder / "out"


def _damage_some(case: Case) -> None:
    files = sorted(path for path in case.given.iterdir())
    for _ in range(case.chance.choice((1, 1, 1, 2, 3))):
        if case.chance.random() < 0.08:
            case.told.append(hostile_files.add_file(case.chance, case.given, case.folder))
        else:
            case.told.append(hostile_files.damage(case.chance, case.chance.choice(files), case.folder))


def source(case: Case, world: World) -> list[Step]:
    """A damaged source: what convert accepts, verify and restore accept."""
    shutil.copytree(world.root / "source", case.given)
    if case.chance.random() < 0.3:
        (case.given / "model.safetensors.index.json").unlink()
        case.told.append("no index")
    _damage_some(case)
    smoke = case.chance.choice(("", " --no-smoke"))
    return [
        Step(f"convert {{given}} {{out}} -q --threads 1{smoke}"),
        Step("verify {out} --source {given} -q --threads 1", only_after_success=True, codes=(0,)),
        Step("restore {out} {back} -q --threads 1", only_after_success=True, codes=(0,)),
        Step("convert {given} {other} --dry-run -q"),
        Step("inspect {given} -q"),
        Step("inspect {given} --json -q"),
    ]


def prepared(case: Case, world: World) -> list[Step]:
    """A damaged prepared directory, as it may come from anybody: what verify passes, restore and relayout take."""
    shutil.copytree(world.root / "prepared", case.given)
    chance = case.chance
    manifest = case.given / "nvfp4_prep.json"
    if chance.random() < 0.5:
        manifest.write_bytes(damaged_json(chance, manifest.read_bytes(), str(case.folder)))
        case.told.append("nvfp4_prep.json: JSON")
    else:
        _damage_some(case)
    steps = [
        Step("verify {given} -q --threads 1"),
        Step("verify {given} --quick --json -q"),
        Step("verify {given} --source {source} -q --threads 1"),
        Step("inspect {given} -q"),
        Step("inspect {given} --json -q"),
        Step("restore {given} {back} -q --threads 1"),
        Step("relayout {given} {out} --gate-up-block 16 -q --threads 1"),
        Step("@load {given} 1 2"),
        Step("convert {source} {given} -q --threads 1 --no-smoke", in_place=True),
        Step("restamp {given} -q", in_place=True),
    ]
    chosen = [step for step in steps[1:] if chance.random() < 0.5]
    passed = Step("restore {given} {other} -q --threads 1", only_after_success=True, codes=(0,))
    return [steps[0], passed, *chosen]


def _damage_journal(case: Case, journal: Path) -> str:
    lines = journal.read_bytes().splitlines(keepends=True)
    number = case.chance.randrange(len(lines))
    damaged = damaged_json(case.chance, lines[number], str(case.folder)).replace(b"\n", b"")
    lines[number] = damaged + case.chance.choice((b"\n", b"\n", b"", b"\r\n"))
    if case.chance.random() < 0.3:
        name = case.chance.choice(("../neighbour/config.json", "link/x", "/dev/null", "elsewhere"))
        lines.append(json.dumps({"file": name, "nbytes": 2}).encode() + b"\n")
    journal.write_bytes(b"".join(lines))
    return "journal"


def unfinished(case: Case, world: World) -> list[Step]:
    """A target whose run was killed, damaged: the command completes or refuses, and touches nothing behind a link."""
    command = case.chance.choice(("convert {source} {out} --no-smoke", "restore {prepared} {out}"))
    command += " -q --threads 1"
    words = command.format(source=world.root / "source", prepared=world.root / "prepared", out=case.out).split(" ")
    fault = world.fault(case.chance.randrange(30, 110), ACTIONS["kill"])
    assert world.server.run(words, fault=fault).code == -9
    chance, work = case.chance, case.out / ".nvfp4_prep"
    journal = work / "journal.jsonl"
    finished = sorted(path for path in case.out.iterdir() if path != work)
    leftovers = [work / name for name in ("leftover", "parts", "source", "writing-x-1")]
    changes: tuple[Callable[[], str], ...] = (
        lambda: _damage_journal(case, journal),
        lambda: _damage_journal(case, journal),
        lambda: hostile_files.put_link(chance, work, case.folder),
        lambda: hostile_files.put_link(chance, chance.choice((work / "lock", journal, *finished)), case.folder),
        lambda: hostile_files.put_special(chance, chance.choice((work / "lock", journal))),
        lambda: hostile_files.put_link(chance, chance.choice(leftovers), case.folder),
        lambda: hostile_files.damage_bytes(chance, journal),
    )
    foreign: tuple[Callable[[], str], ...] = (
        lambda: hostile_files.put_link(chance, case.out / "link", case.folder),
        lambda: hostile_files.add_file(chance, case.out, case.folder),
        lambda: hostile_files.damage(chance, chance.choice(finished or [journal]), case.folder),
    )
    is_foreign = chance.random() < 0.25  # nobody promises to notice it while converting: verify does
    case.told.append(chance.choice(foreign if is_foreign else changes)())
    restart = chance.choice(("", " --restart"))
    result = None if is_foreign else world.reference(Scenario("undisturbed", command))[0]
    return [Step(command + restart, result=result), Step("verify {out} --quick -q"), Step("inspect {out} -q")]


AREAS: dict[str, Callable[[Case, World], list[Step]]] = {
    "source": source,
    "prepared": prepared,
    "unfinished": unfinished,
}
