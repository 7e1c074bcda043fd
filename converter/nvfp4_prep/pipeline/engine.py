"""The engine: runs file jobs with several files and units in work, and commits files when they are whole.

Workers take one of three tasks, in this order: update a digest whose next bytes are there; commit a file that is
complete; work on the next unit of one of the open files. So nobody waits for a turn: a digest that is computed in the
units' order is advanced by whichever worker is free, and the digests of several files and of several tensors of one
file run side by side. Everything expensive releases the GIL: preadv and pwrite, hashlib, torch.

Peak memory: the footprints of the units whose bytes are still needed, held below the memory budget (one unit always
runs), whatever the number of experts, layers or files. A unit is given out only after all earlier units of its file,
so the one that a digest waits for is always in work.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvfp4_prep._util.arguments import COUNT, THREADS
from nvfp4_prep._util.buffers import buffers_kept
from nvfp4_prep._util.progress import NoProgress, Progress
from nvfp4_prep._util.steps import note
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.errors import ConversionInterrupted, NvfpPrepError, UsageError
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.file_run import DigestLane, FileRun, HeldUnit
from nvfp4_prep.pipeline.jobs import FileJob, JobResult, Unit, UnitResult, progress_labels
from nvfp4_prep.pipeline.workers import WorkerThreads, default_memory_nbytes, default_threads

__all__ = ["Hooks", "files_at_once", "run_jobs"]

READ_AHEAD_UNITS = 8
"""The disk works on so many units beyond those in work; on a cold source 7.3 s instead of 8.9 s for 4.9 GB."""
_FOOTPRINT = 4
"""A unit holds its input, its output, one copy on the way and one on the way back for the check."""


def files_at_once(threads: int) -> int:
    """Return how many files are open at once: one for two workers.

    The sha256 of one file is sequential, about 1.5 GB/s, and so limits the file's rate; two workers are about what
    the rest of the work on its bytes costs.
    """
    return max(1, threads // 2)


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the caller of :func:`run_jobs`.

    Attributes:
        on_done: called with every finished job, from a worker thread, after the file stands under its final name.
        before_file: called before a job's file is created; may wait for room, but no longer than until the event is
            set.
        on_stop: called when the run has failed or was interrupted: whatever makes workers wait must let them go.
    """

    on_done: Callable[[JobResult], None] = lambda result: None
    before_file: Callable[[FileJob, threading.Event], None] = lambda job, stop: None
    on_stop: Callable[[], None] = lambda: None


_NO_HOOKS = Hooks()
_Task = Callable[[], None]


class _Run:
    """The state that workers share; ``_changed`` guards all of it."""

    def __init__(
        self,
        jobs: Sequence[FileJob],
        target: Target | None,
        progress: Progress,
        hooks: Hooks,
        files: int,
        memory_nbytes: int,
    ) -> None:
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self.created: list[FileRun] = []
        self._target = target
        self._progress = progress
        self._hooks = hooks
        self._files = files
        self._memory_nbytes = memory_nbytes
        self._held_nbytes = 0
        self._jobs = deque(jobs)
        self._labels = progress_labels(jobs)
        self._opening = 0
        self._open_runs: list[FileRun] = []
        self._lanes: deque[DigestLane] = deque()
        self._complete: deque[FileRun] = deque()
        self._next_file = 0
        self._changed = threading.Condition()

    def work(self) -> None:
        """Do tasks until there are none left, or the run has failed. One worker's whole life."""
        try:
            while True:
                task = self._wait_for_task()
                if task is None:
                    return
                task()
                del task  # it holds a unit's bytes, which no longer count as held while this worker waits
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the run; the first failure is the one that counts."""
        with self._changed:
            if self.failure is None:
                self.failure = error
            self.stop.set()
            self._changed.notify_all()
        self._hooks.on_stop()

    def check_all_done(self) -> None:
        """Raise unless every job was committed: what nobody worked on is not done, and must never be called right."""
        left = len(self._jobs) + len(self._open_runs)
        if left or self._opening:
            raise NvfpPrepError(f"{left} of the files were not worked on: a mistake in this program; report it")

    def _wait_for_task(self) -> _Task | None:
        with self._changed:
            while not self.stop.is_set():
                task = self._next_task()
                if task is not None:
                    return task
                if not self._jobs and not self._open_runs and not self._opening:
                    self._changed.notify_all()
                    return None
                self._changed.wait(0.2)
        return None

    def _next_task(self) -> _Task | None:
        if self._lanes:
            lane = self._lanes.popleft()
            held, parts = lane.queue.popleft()
            return lambda: self._digest(lane, held, parts)
        if self._complete:
            run = self._complete.popleft()
            return lambda: self._commit(run)
        waiting = [run for run in self._open_runs if run.dispatched < len(run.units)]
        if self._jobs and len(waiting) + self._opening < self._files:
            self._opening += 1
            job = self._jobs.popleft()
            return lambda: self._open(job)
        return self._next_unit(waiting)

    def _next_unit(self, waiting: Sequence[FileRun]) -> _Task | None:
        if not waiting:
            return None
        self._next_file += 1
        run = waiting[self._next_file % len(waiting)]
        number = run.dispatched
        unit = run.units[number]
        nbytes = _FOOTPRINT * unit.nbytes
        if self._held_nbytes and self._held_nbytes + nbytes > self._memory_nbytes:
            return None
        self._held_nbytes += nbytes
        run.dispatched += 1
        return lambda: self._do(run, number, unit)

    def _open(self, job: FileJob) -> None:
        """Create a job's file; slow parts and waits happen without the lock."""
        units = list(job.units()) or [Unit(0, UnitResult)]
        self._hooks.before_file(job, self.stop)
        if self.stop.is_set():
            return
        file = None if self._target is None else self._target.create(job.name, job.nbytes)
        run = FileRun(job, file, units)
        self.created.append(run)
        if file is not None:
            file.write(0, job.header)
        for unit in units[:READ_AHEAD_UNITS]:
            unit.read_ahead()
        with self._changed:
            self._open_runs.append(run)
            self._opening -= 1
            self._changed.notify_all()

    def _do(self, run: FileRun, number: int, unit: Unit) -> None:
        for later in run.units[number + READ_AHEAD_UNITS : number + READ_AHEAD_UNITS + 1]:
            later.read_ahead()
        result = unit.work()
        run.write(result)
        with self._changed:
            lanes, free = run.take(number, result)
            for lane in lanes:
                self._offer(lane)
            self._release(free)
            self._changed.notify(len(lanes) + 1)

    def _offer(self, lane: DigestLane) -> None:
        if lane.queue and not lane.busy:
            lane.busy = True
            self._lanes.append(lane)

    def _digest(self, lane: DigestLane, held: HeldUnit, parts: Sequence[memoryview]) -> None:
        lane.update(parts)
        with self._changed:
            lane.busy = False
            self._offer(lane)
            held.readers -= 1
            if not held.readers:
                self._release([held])
            self._changed.notify(2)

    def _release(self, units: Sequence[HeldUnit]) -> None:
        """Give back the memory of units that nothing needs any more, and see whether their files are complete."""
        for held in units:
            self._held_nbytes -= _FOOTPRINT * held.unit.nbytes
            nbytes, last = held.run.count(held.unit)
            self._progress.advance(nbytes, self._labels[held.run.job.name])
            if last:
                self._complete.append(held.run)

    def _commit(self, run: FileRun) -> None:
        result = run.commit()
        self._hooks.on_done(result)
        note("%s: %s done", result.name, format_nbytes(result.nbytes))
        with self._changed:
            self._open_runs.remove(run)
            self._changed.notify_all()


def _check_budget(jobs: Sequence[FileJob], memory_nbytes: int) -> None:
    needed = _FOOTPRINT * max((unit.nbytes for job in jobs for unit in job.units()), default=0)
    if memory_nbytes < needed:
        raise UsageError(
            "the memory budget is too small for one piece of work",
            expected=f"at least {needed:,} bytes",
            actual=f"{memory_nbytes:,} bytes",
            next_step=f"Give at least --memory {-(-needed // 10**6)}; the same command resumes.",
        )


def run_jobs(
    jobs: Sequence[FileJob],
    target: Target | None,
    *,
    threads: int | None = None,
    files: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
    hooks: Hooks = _NO_HOOKS,
) -> None:
    """Run jobs, started in their order, several files and units at a time.

    Args:
        jobs: files to make; with ``target=None`` nothing is written and only digests and facts are computed.
        target: where files go.
        threads: workers; default :func:`default_threads`.
        files: open at once; default :func:`files_at_once`. 1 for a source or sink that has room for one file.
        memory_nbytes: budget of the buffers; default :func:`default_memory_nbytes`. Does not change the output.
        progress: receives byte-count updates.
        hooks: called on the way.

    Raises:
        UsageError: if there would be no worker or no file, or the budget is too small for one of the units, before any
            of them is begun.
        NvfpPrepError: what a unit or the target raised first; unfinished files are deleted, finished ones stay.
        ConversionInterrupted: on Ctrl-C.
    """
    count = default_threads() if threads is None else THREADS.read("argument threads", threads)
    if files is not None:
        COUNT.read("argument files", files)
    if memory_nbytes is not None:
        _check_budget(jobs, COUNT.read("argument memory_nbytes", memory_nbytes))
    budget = memory_nbytes or default_memory_nbytes(count)
    run = _Run(
        jobs,
        target,
        progress or NoProgress(),
        hooks,
        files or files_at_once(count),
        budget,
    )
    workers = WorkerThreads(run.work, count)
    with buffers_kept(budget):
        try:
            workers.start()
            workers.wait()
        except KeyboardInterrupt:
            run.fail(ConversionInterrupted("interrupted", next_step="Run the same command to resume."))
        finally:
            run.stop.set()
            workers.wait_through_interrupts()
            for file_run in run.created:
                file_run.abandon()
    if run.failure is not None:
        raise run.failure
    run.check_all_done()
