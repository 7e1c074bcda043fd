"""How the commands scale with cores: seconds, GB/s and peak memory of every command, with ``cp`` beside, in memory.

    python benchmarks/bench_scaling.py --memory /dev/shm --before /data/older-tree
    python benchmarks/bench_scaling.py --only tiny --cores 2 --repetitions 5 --minutes 5

Two trees, this one and that of ``--before`` (a folder with converter/ and kernels/), take turns in one run. Beside
them stand copies and, as the limit, the same work by processes that share nothing (scaling_limit.py). Each command runs
in a process of its own that may use so many cores; its seconds count from when everything is imported
(``total``: from the start of Python to its end). ``--minutes`` is shared out over the data sets: what was measured when
it is over is written, and ``complete`` says whether that is all. Needs three times a data set's size in ``--memory``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
CHILD = HERE / "scaling_child.py"
KIMI = {"hidden": 7168, "intermediate": 2048, "vocabulary": 1024, "shard_nbytes": 1_250_000_000}
TINY = {"hidden": 64, "intermediate": 32, "vocabulary": 64, "shard_nbytes": 12_000_000}
COMMANDS = ("plan", "convert", "verify", "verify --source", "restore", "relayout")
COPIES = ("cp -r", "eight cp")
LIMIT = "nothing shared"
"""As many processes as cores do a conversion's work each for itself, see scaling_limit.py."""
LATE_S = 90
"""A command may go on so long after its time is over before it is ended and left out."""


@dataclass(frozen=True)
class DataSet:
    """A sample, described as in :class:`nvfp4_prep.SampleModel`."""

    name: str
    about: str
    model: dict[str, int]


def data_sets(experts: int, layers: int) -> list[DataSet]:
    """The three sets; smaller ones for a machine that has little memory."""
    few = max(1, experts // 8)
    return [
        DataSet("layer", f"one layer of {experts} Kimi experts", {"layers": 2, "experts": experts, **KIMI}),
        DataSet("layers", f"eight layers of {few} Kimi experts", {"layers": 9, "experts": few, **KIMI}),
        DataSet("tiny", f"{layers} layers of 384 tiny experts", {"layers": layers + 1, "experts": 384, **TINY}),
    ]


@dataclass
class Row:
    """All turns of one command of one side on so many cores."""

    data_set: str
    cores: int
    command: str
    side: str
    nbytes: int
    seconds: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    peak_nbytes: int = 0
    failed: str = ""

    def figures(self) -> dict[str, Any]:
        known = {"set": self.data_set, "cores": self.cores, "command": self.command, "side": self.side}
        if not self.seconds:
            return {**known, "failed": self.failed}
        figures = {**known, "seconds": spread(self.seconds), "total": spread(self.total)}
        figures["gb_per_s"] = self.nbytes / figures["seconds"]["median"] / 1e9
        return {**figures, "peak_nbytes": self.peak_nbytes, **({"failed": self.failed} if self.failed else {})}


def spread(values: list[float]) -> dict[str, Any]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "seconds": values}


class OutOfTimeError(Exception):
    """The time of a data set is over."""


class Bench:
    """The rows so far, and the time that is left."""

    def __init__(self, folder: Path, sides: dict[str, Path]) -> None:
        self.rows: dict[tuple[str, int, str, str], Row] = {}
        self.deadline = float("inf")
        self._folder = folder
        self._sides = sides
        self._cores = sorted(os.sched_getaffinity(0))

    def child(self, side: Path, cores: int, task: str, **order: Any) -> dict[str, Any]:
        """What the child printed.

        Raises:
            OutOfTimeError: if it was not done in time.
            RuntimeError: if it failed.
        """
        order |= {"task": task, "cores": self._cores[:cores]}
        path = os.pathsep.join([str(side / "converter"), str(side / "kernels")])
        command = [sys.executable, str(CHILD), json.dumps(order, default=str)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                check=False,
                timeout=None if self.deadline == float("inf") else max(1.0, self.deadline + LATE_S - time.monotonic()),
            )
        except subprocess.TimeoutExpired as error:
            raise OutOfTimeError from error
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no words"])[-1])
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def row(self, data_set: DataSet, cores: int, command: str, side: str, nbytes: int) -> Row:
        key = (data_set.name, cores, command, side)
        return self.rows.setdefault(key, Row(data_set.name, cores, command, side, nbytes))

    def turn(self, data_set: DataSet, cores: int, nbytes: int) -> None:
        """Every command once for both sides, and the copies."""
        for name in self._sides:
            self._chain(data_set, cores, nbytes, name)
        for command in COPIES:
            self._check_time()
            seconds = copy(command, self._folder / "source", self._folder / "copy", set(self._cores[:cores]))
            row = self.row(data_set, cores, command, "cp", nbytes)
            row.seconds.append(seconds)
            row.total.append(seconds)
            show(row)
        self._check_time()
        rate = self.child(self._sides["now"], cores, "limit", folder=self._folder)["bytes_per_s"]
        row = self.row(data_set, cores, LIMIT, "limit", nbytes)
        row.seconds.append(nbytes / rate)
        row.total.append(nbytes / rate)
        show(row)

    def _chain(self, data_set: DataSet, cores: int, nbytes: int, side: str) -> None:
        made, target = self._folder / "prepared", self._folder / "target"
        try:
            for command in COMMANDS:
                self._check_time()
                out = made if command == "convert" else target
                row = self.row(data_set, cores, command, side, nbytes)
                begun = time.perf_counter()
                try:
                    answer = self.child(
                        self._sides[side],
                        cores,
                        command,
                        source=self._folder / "source",
                        checkpoint=made,
                        target=out,
                    )
                except RuntimeError as error:
                    row.failed = str(error)
                else:
                    row.total.append(time.perf_counter() - begun)
                    row.seconds.append(answer["seconds"])
                    row.peak_nbytes = max(row.peak_nbytes, answer["peak_nbytes"])
                show(row)
                shutil.rmtree(target, ignore_errors=True)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTimeError


def copy(command: str, source: Path, target: Path, cores: set[int]) -> float:
    """Seconds of ``cp -r``, or of eight ``cp`` that share the files."""
    target.mkdir()
    files = sorted((path for path in source.iterdir()), key=lambda path: -path.stat().st_size)
    orders = [["cp", "-r", str(source), str(target)]]
    if command == "eight cp":
        orders = [["cp", *map(str, files[n::8]), str(target)] for n in range(min(8, len(files)))]
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        begun = time.perf_counter()
        running = [subprocess.Popen(order) for order in orders]
        codes = [process.wait() for process in running]
        seconds = time.perf_counter() - begun
    finally:
        os.sched_setaffinity(0, mine)
        shutil.rmtree(target)
    if any(codes):
        raise SystemExit(f"{command} failed")
    return seconds


def show(row: Row) -> None:
    """One line of what was just measured, on stderr."""
    last = row.failed or (
        f"{row.seconds[-1]:8.2f} s {row.nbytes / row.seconds[-1] / 1e9:6.2f} GB/s {row.peak_nbytes / 1e9:5.2f} GB"
    )
    print(f"{row.data_set:8}{row.cores:3} {row.command:16}{row.side:8}{last}", file=sys.stderr, flush=True)


def report(figures: dict[str, Any]) -> None:
    """The tables, on stdout."""
    rates = figures["rates"]
    print(f"one core: sha256 {rates['sha256_per_s'] / 1e9:.2f} GB/s, copy {rates['memcpy_per_s'] / 1e9:.2f} GB/s")
    for known in figures["sets"]:
        print(f"\n{known['about']}: {known['nbytes'] / 1e9:.2f} GB, {known['expert_tensors']} tensors of experts")
        print(f"{'cores':>5} {'command':16}{'side':8}{'s':>8}{'total':>8}{'GB/s':>8}{'peak GB':>9}")
        for row in (row for row in figures["rows"] if row["set"] == known["name"]):
            head = f"{row['cores']:5} {row['command']:16}{row['side']:8}"
            if "seconds" not in row:
                print(f"{head}failed: {row['failed']}")
                continue
            times = f"{row['seconds']['median']:8.2f}{row['total']['median']:8.2f}"
            print(f"{head}{times}{row['gb_per_s']:8.2f}{row['peak_nbytes'] / 1e9:9.2f}")
    if not figures["complete"]:
        print("\nnot complete: the time was over")


def cores_of(wanted: list[int]) -> list[int]:
    """Those core counts that this machine has."""
    return [cores for cores in wanted if cores <= len(os.sched_getaffinity(0))]


def turns(cores: list[int], repetitions: int) -> Iterator[int]:
    """Core counts in order, all of them before the next repetition."""
    for _ in range(repetitions):
        yield from cores


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sides = {**({"before": options.before} if options.before else {}), "now": ROOT}
    bench = Bench(folder, sides)
    end = time.monotonic() + 60 * options.minutes
    wanted = [one for one in data_sets(options.experts, options.layers) if one.name in options.only]
    known, complete = [], True
    rates = bench.child(ROOT, 1, "rates")
    for number, data_set in enumerate(wanted):
        bench.deadline = float("inf")
        made = bench.child(ROOT, 10**6, "make", target=folder / "source", model=data_set.model)
        known.append({"name": data_set.name, "about": data_set.about, **made})
        bench.deadline = time.monotonic() + (end - time.monotonic()) / (len(wanted) - number)
        try:
            for cores in turns(cores_of(options.cores), options.repetitions):
                bench.turn(data_set, cores, made["nbytes"])
        except OutOfTimeError:
            complete = False
        shutil.rmtree(folder / "source")
    return {
        "repetitions": options.repetitions,
        "complete": complete,
        "cores": cores_of(options.cores),
        "before": before_name(options.before),
        "rates": rates,
        "sets": known,
        "rows": [row.figures() for row in bench.rows.values()],
    }


def before_name(folder: Path | None) -> str:
    """The older tree's commit, or its folder's name where there is no git; empty without one."""
    if folder is None:
        return ""
    if not (folder / ".git").exists():
        return folder.name
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or folder.name


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in data_sets(8, 1)]
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="folder in memory (default /dev/shm)")
    parser.add_argument("--before", type=Path, help="an older tree: a folder with converter/ and kernels/")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SET", help=", ".join(names))
    parser.add_argument("--cores", nargs="+", type=int, default=[2, 4, 8, 16, 32], help="those the machine has")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=25, help="after which it stops and writes what it has")
    parser.add_argument("--experts", type=int, default=384, help="of the one Kimi layer; an eighth in eight layers")
    parser.add_argument("--layers", type=int, default=60, help="of tiny experts")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    if options.before is not None:
        options.before = options.before.resolve()
        if not (options.before / "converter" / "nvfp4_prep").is_dir():
            parser.error(f"--before: no converter/nvfp4_prep in {options.before}")
    if not cores_of(options.cores):
        parser.error(f"--cores: this machine has {len(os.sched_getaffinity(0))}")
    return options


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="bench-scaling-", dir=options.memory))
    try:
        figures = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    report(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
