"""One file in work: its units finish in any order, its digests are computed in order by whichever worker is free."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nvfp4_prep.output.atomic_file import AtomicFile
from nvfp4_prep.output.experts_fact import ExpertsFact
from nvfp4_prep.pipeline.jobs import FileJob, JobResult, Unit, UnitResult

__all__ = ["DigestLane", "FileRun", "HeldUnit"]


@dataclass
class HeldUnit:
    """A finished unit whose bytes some digest still needs.

    Attributes:
        run: the file that it belongs to.
        unit: what was done.
        readers: digests that have not taken its bytes yet.
    """

    run: FileRun
    unit: Unit
    readers: int = 0


class DigestLane:
    """A sha256 over the parts of a file's units, in the units' order. One worker at a time updates it.

    The queue is guarded by the scheduler's lock, the digest by the rule that a lane with ``busy`` set belongs to one
    worker.
    """

    def __init__(self, initial: bytes = b"") -> None:
        self.queue: deque[tuple[HeldUnit, Sequence[memoryview]]] = deque()
        self.busy = False
        self._sha256 = hashlib.sha256(initial)

    def update(self, parts: Sequence[memoryview]) -> None:
        """Add the bytes of one unit."""
        for part in parts:
            self._sha256.update(part)

    def hexdigest(self) -> str:
        """Return the digest of everything added so far."""
        return self._sha256.hexdigest()


class FileRun:
    """A job in work. All methods but :meth:`write` and :meth:`commit` are called under the scheduler's lock.

    Attributes:
        job: what to make.
        file: the file at its temporary place; ``None`` where nothing is written, or after :meth:`commit`.
        units: the job's units.
        dispatched: how many of them were given to workers.
    """

    def __init__(self, job: FileJob, file: AtomicFile | None, units: Sequence[Unit]) -> None:
        self.job = job
        self.file = file
        self.units = units
        self.dispatched = 0
        self._left = len(units)
        self._in_order = 0
        self._finished: dict[int, UnitResult] = {}
        self._out = DigestLane(job.header) if job.digest else None
        self._lanes: dict[str, DigestLane] = {}
        self._facts: list[ExpertsFact] = []
        self._work_nbytes = max(1, sum(unit.nbytes for unit in units))
        self._work_done = 0

    def write(self, result: UnitResult) -> None:
        """Write a unit's pieces at their offsets; workers do this at the same time."""
        if self.file is not None:
            for offset, data in result.pieces:
                self.file.write(offset, data)

    def take(self, number: int, result: UnitResult) -> tuple[list[DigestLane], list[HeldUnit]]:
        """Accept a finished unit.

        Returns:
            The lanes that have something to do now, and the units that no digest needs (any more).
        """
        self._finished[number] = result
        lanes: list[DigestLane] = []
        free: list[HeldUnit] = []
        while self._in_order in self._finished:
            result = self._finished.pop(self._in_order)
            held = HeldUnit(self, self.units[self._in_order])
            self._in_order += 1
            if result.fact is not None:
                self._facts.append(result.fact)
            for lane, parts in self._parts(result):
                held.readers += 1
                lane.queue.append((held, parts))
                lanes.append(lane)
            if not held.readers:
                free.append(held)
        return lanes, free

    def _parts(self, result: UnitResult) -> list[tuple[DigestLane, list[memoryview]]]:
        """Return the bytes of a unit by the lane that digests them."""
        found: dict[str, list[memoryview]] = {}
        for key, data in result.digests:
            found.setdefault(key, []).append(data)
        lanes = [(self._lanes.setdefault(key, DigestLane()), parts) for key, parts in found.items()]
        if self._out is not None and result.pieces:
            lanes.append((self._out, [data for _, data in result.pieces]))
        return lanes

    def count(self, unit: Unit) -> tuple[int, bool]:
        """Count a unit as done; return its share of the file's size, and whether it was the last one."""
        before = self._work_done * self.job.nbytes // self._work_nbytes
        self._work_done += unit.nbytes
        self._left -= 1
        return self._work_done * self.job.nbytes // self._work_nbytes - before, self._left == 0

    def commit(self) -> JobResult:
        """Flush the file, note it in the journal and put it into place."""
        result = JobResult(
            name=self.job.name,
            nbytes=self.job.nbytes,
            sha256=None if self._out is None else self._out.hexdigest(),
            digests={key: lane.hexdigest() for key, lane in self._lanes.items()},
            facts=tuple(self._facts),
        )
        if self.file is not None:
            self.file.commit(result.to_entry())
            self.file = None
        return result

    def abandon(self) -> None:
        """Delete the temporary file."""
        if self.file is not None:
            self.file.abandon()
