"""Jobs of the engine: a job makes one file from units of work and ends in a result for the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvfp4_prep.checkpoint.filenames import EXPERTS_PREFIX
from nvfp4_prep.output.experts_fact import ExpertsFact
from nvfp4_prep.output.journal_entry import JournalEntry

__all__ = ["UNIT_NBYTES", "FileJob", "JobResult", "Unit", "UnitResult", "progress_labels"]

UNIT_NBYTES = 16 * 2**20
"""Source bytes that a unit aims at: large enough for sequential disk rates, small enough to stay in the budget."""


@dataclass
class UnitResult:
    """Result of a unit: the pieces to write, digests and facts.

    Attributes:
        pieces: bytes to write, with their offset in the file. In the file's order and without gaps where the job wants
            the file's digest.
        digests: bytes that go into the digest of that key.
        fact: for the job's result, in the order of the units.
    """

    pieces: list[tuple[int, memoryview]] = field(default_factory=list)
    digests: list[tuple[str, memoryview]] = field(default_factory=list)
    fact: ExpertsFact | None = None


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
    facts: tuple[ExpertsFact, ...]

    def to_entry(self) -> dict[str, Any]:
        """Return the journal's entry."""
        return {"sha256": self.sha256, "digests": self.digests, "facts": [fact.to_json() for fact in self.facts]}

    @classmethod
    def from_entry(cls, entry: JournalEntry) -> JobResult:
        """Return the result that a journal entry noted."""
        return cls(entry.file, entry.nbytes, entry.sha256, entry.digests, entry.facts)


def progress_labels(jobs: Sequence[FileJob]) -> dict[str, str]:
    """Return what a progress bar calls each job's file: ``layer 3/60`` for the experts of a layer, else its name."""
    layers = sorted({job.name for job in jobs if job.name.startswith(EXPERTS_PREFIX)})
    numbers = {name: number for number, name in enumerate(layers, 1)}
    return {job.name: f"layer {numbers[job.name]}/{len(layers)}" if job.name in numbers else job.name for job in jobs}
