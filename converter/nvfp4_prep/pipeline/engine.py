"""Runs file jobs: units of work in parallel, digests in order, files committed when whole.

A job is a file to write (or only to digest). Its units are taken in order by worker threads; reading, transforming
and writing of different units overlap, while digests are updated in the units' order. Everything expensive releases
the GIL: preadv and pwrite, hashlib, torch.

Peak memory: the sum of the footprints of the units in work, held below ``MEMORY_BUDGET_NBYTES`` (one unit always
runs), whatever the number of experts, layers or threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvfp4_prep._util.progress import NoProgress, Progress
from nvfp4_prep.errors import ConversionInterrupted
from nvfp4_prep.output.atomic_file import TargetFile
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.workers import MEMORY_BUDGET_NBYTES, Budget, Crew, Stopped, Turnstile

__all__ = ["UNIT_NBYTES", "FileJob", "JobResult", "Unit", "UnitResult", "default_threads", "run_jobs"]

UNIT_NBYTES = 16 * 2**20
"""Source bytes that a unit aims at: large enough for sequential disk rates, small enough to stay in the budget."""
READ_AHEAD_UNITS = 8
"""The disk works on so many units beyond those in work; on a cold source 7.3 s instead of 8.9 s for 4.9 GB."""
_FOOTPRINT = 4
"""A unit holds its input, its output, one copy on the way and one on the way back for the check."""


@dataclass
class UnitResult:
    """What a unit made.

    Attributes:
        pieces: bytes to write, with their offset in the file. In the file's order and without gaps where the job wants
            the file's digest.
        digests: bytes that go into the digest of that key.
        fact: JSON value for the job's result, in the order of the units.
    """

    pieces: list[tuple[int, memoryview]] = field(default_factory=list)
    digests: list[tuple[str, memoryview]] = field(default_factory=list)
    fact: Any = None


@dataclass(frozen=True)
class Unit:
    """A piece of a job: ``work`` may run in any thread; ``nbytes`` is its share of the job and of the memory.

    ``read_ahead`` asks for the bytes that the work will read, without waiting; called some units earlier.
    """

    nbytes: int
    work: Callable[[], UnitResult]
    read_ahead: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class FileJob:
    """A file to make.

    Attributes:
        name: in the target.
        nbytes: size, header included.
        header: bytes at the file's start.
        units: makes the units, when the job's turn comes.
        digest: whether the file's sha256 is wanted.
    """

    name: str
    nbytes: int
    header: bytes
    units: Callable[[], Iterable[Unit]]
    digest: bool = True


@dataclass(frozen=True)
class JobResult:
    """A finished job: the file's sha256, the digests by key (hex) and the units' facts that are not ``None``."""

    name: str
    nbytes: int
    sha256: str | None
    digests: dict[str, str]
    facts: list[Any]

    def to_entry(self) -> dict[str, Any]:
        """For the journal."""
        return {"sha256": self.sha256, "digests": self.digests, "facts": self.facts}

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> JobResult:
        """Inverse of :meth:`to_entry`, with the journal's file name and size."""
        return cls(entry["file"], entry["nbytes"], entry["sha256"], entry["digests"], entry["facts"])


def default_threads() -> int:
    """Workers: one more than the processors, because units wait for the disk; at most 16."""
    return min(16, len(os.sched_getaffinity(0)) + 1)


class _Running:
    """A job in work."""

    def __init__(self, job: FileJob, file: TargetFile | None, units: Sequence[Unit], stop: threading.Event) -> None:
        self.job = job
        self.file = file
        self._left = len(units)
        self._work_nbytes = max(1, sum(unit.nbytes for unit in units))
        self._work_done = 0
        self._lock = threading.Lock()
        self._in_turn = Turnstile(stop)
        self._out_turn = Turnstile(stop)
        self._digests: dict[str, Any] = {}
        self._facts: list[Any] = []
        self._sha256 = hashlib.sha256(job.header) if job.digest else None

    def begin(self) -> None:
        """Writes the header."""
        if self.file is not None:
            self.file.write(0, self.job.header)

    def take_in(self, number: int, result: UnitResult) -> None:
        """Digests and facts, in order."""
        self._in_turn.wait(number)
        for key, data in result.digests:
            if key not in self._digests:
                self._digests[key] = hashlib.sha256()
            self._digests[key].update(data)
        if result.fact is not None:
            self._facts.append(result.fact)
        self._in_turn.leave()

    def put_out(self, number: int, result: UnitResult) -> None:
        """Writes at once, then digests in order."""
        if self.file is not None:
            for offset, data in result.pieces:
                self.file.write(offset, data)
        if self._sha256 is None:
            return
        self._out_turn.wait(number)
        for _, data in result.pieces:
            self._sha256.update(data)
        self._out_turn.leave()

    def progress(self, unit: Unit) -> int:
        """The unit's share of the file's size."""
        with self._lock:
            before = self._work_done * self.job.nbytes // self._work_nbytes
            self._work_done += unit.nbytes
            return self._work_done * self.job.nbytes // self._work_nbytes - before

    def finish_unit(self) -> JobResult | None:
        """Counts down; the last unit commits the file and returns the result."""
        with self._lock:
            self._left -= 1
            if self._left:
                return None
        result = JobResult(
            name=self.job.name,
            nbytes=self.job.nbytes,
            sha256=None if self._sha256 is None else self._sha256.hexdigest(),
            digests={key: digest.hexdigest() for key, digest in self._digests.items()},
            facts=self._facts,
        )
        if self.file is not None:
            self.file.commit(result.to_entry())
            self.file = None
        return result


@dataclass(frozen=True)
class _Hooks:
    """See :func:`run_jobs`."""

    on_done: Callable[[JobResult], None]
    before_file: Callable[[FileJob, threading.Event], None]
    on_stop: Callable[[], None]


class _Run:
    def __init__(self, target: Target | None, progress: Progress, hooks: _Hooks) -> None:
        self.target = target
        self.progress = progress
        self.hooks = hooks
        self.stop = threading.Event()
        self.budget = Budget(MEMORY_BUDGET_NBYTES, self.stop)
        self.failure: BaseException | None = None
        self.open: list[_Running] = []
        self._dispatch = threading.Lock()

    def units(self, jobs: Sequence[FileJob]) -> Iterator[tuple[_Running, int, Unit]]:
        for job in jobs:
            units = list(job.units()) or [Unit(0, UnitResult)]
            self.hooks.before_file(job, self.stop)
            if self.stop.is_set():
                return
            file = None if self.target is None else self.target.create(job.name, job.nbytes)
            running = _Running(job, file, units, self.stop)
            self.open.append(running)
            running.begin()
            for unit in units[:READ_AHEAD_UNITS]:
                unit.read_ahead()
            for number, unit in enumerate(units):
                for later in units[number + READ_AHEAD_UNITS : number + READ_AHEAD_UNITS + 1]:
                    later.read_ahead()
                yield running, number, unit

    def work(self, units: Iterator[tuple[_Running, int, Unit]]) -> None:
        try:
            while not self.stop.is_set():
                with self._dispatch:
                    item = next(units, None)
                    if item is None:
                        return
                    self.budget.take(_FOOTPRINT * item[2].nbytes)
                try:
                    self._do(*item)
                finally:
                    self.budget.give(_FOOTPRINT * item[2].nbytes)
        except Stopped:
            return
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the run; the first failure is the one that counts."""
        if self.failure is None:
            self.failure = error
        self.stop.set()
        self.hooks.on_stop()

    def _do(self, running: _Running, number: int, unit: Unit) -> None:
        result = unit.work()
        running.take_in(number, result)
        running.put_out(number, result)
        self.progress.advance(running.progress(unit), running.job.name)
        finished = running.finish_unit()
        if finished is not None:
            self.open.remove(running)
            self.hooks.on_done(finished)


def run_jobs(
    jobs: Sequence[FileJob],
    target: Target | None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    on_done: Callable[[JobResult], None] = lambda result: None,
    before_file: Callable[[FileJob, threading.Event], None] = lambda job, stop: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Runs jobs in their order, several units at a time.

    Args:
        jobs: files to make; with ``target=None`` nothing is written and only digests and facts are computed.
        target: where files go.
        threads: workers.
        progress: told of every unit.
        on_done: called with every finished job, from a worker thread, after the file stands under its final name.
        before_file: called before a job's file is created; may wait for room, but no longer than until the event is
            set.
        on_stop: called when the run has failed or was interrupted: whatever makes workers wait must let them go.

    Raises:
        NvfpPrepError: what a unit or the target raised first; unfinished files are deleted, finished ones stay.
        ConversionInterrupted: on Ctrl-C.
    """
    run = _Run(target, progress or NoProgress(), _Hooks(on_done, before_file, on_stop))
    units = run.units(jobs)
    count = threads or default_threads()
    crew = Crew(lambda: run.work(units), count)
    try:
        crew.start()
        crew.wait()
    except KeyboardInterrupt:
        run.fail(ConversionInterrupted("interrupted", next_step="The same command continues."))
    finally:
        run.stop.set()
        crew.wait_through_interrupts()
        for running in run.open:
            if running.file is not None:
                running.file.abandon()
    if run.failure is not None:
        raise run.failure
