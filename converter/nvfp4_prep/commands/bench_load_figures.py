"""Figures of ``bench_load``: seconds, bytes and requests of all ranks, and what they waited for."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep.commands.bench_load_rank import RankTurn

__all__ = ["Limit", "LoadBench", "LoadFigures", "find_limit"]

_MOSTLY = 0.75
"""Share of a time from which on something has been busy all the time."""


class Limit(enum.StrEnum):
    """The resource that a load waited for."""

    STORAGE = "storage"
    CORES = "cores"
    ONE_THREAD = "one thread"
    COPIES = "copies to the GPU"
    RANKS = "other ranks"

    @property
    def advice(self) -> str:
        """The finding's meaning, in words."""
        return _ADVICE[self]


_ADVICE = {
    Limit.STORAGE: "the reading threads waited for the files: faster storage, or more threads where it likes many",
    Limit.CORES: "all cores of this host were busy: more cores, not more threads",
    Limit.ONE_THREAD: "each rank's threads were busy while cores were free: more threads, or fewer ranks a thread",
    Limit.COPIES: "the reading threads waited for staging to be copied: the bus, or a GPU that others use",
    Limit.RANKS: "the reading threads had nothing to do most of the time: the ranks waited for each other",
}


@dataclass(frozen=True)
class LoadFigures:
    """Turns of one kind, the median one's in full.

    Attributes:
        cold: whether the files had been taken out of the page cache.
        cached_share: of the pages that were in the page cache all the same, sampled; tmpfs cannot be cold.
        seconds: of each turn, from the first rank's begin to the last one's end.
        ranks: of the median turn.
        limit: what that turn waited for.
    """

    cold: bool
    cached_share: float
    seconds: tuple[float, ...]
    ranks: tuple[RankTurn, ...]
    limit: Limit

    @property
    def median_s(self) -> float:
        """Median of the seconds; of an even number the lower one, which is a turn's."""
        return statistics.median_low(self.seconds)

    @property
    def reads(self) -> int:
        """Requests of all ranks."""
        return sum(rank.reads for rank in self.ranks)

    @property
    def read_nbytes(self) -> int:
        """Bytes that all ranks read."""
        return sum(rank.read_nbytes for rank in self.ranks)


@dataclass(frozen=True)
class LoadBench:
    """Times of a host's ranks for loading some layers.

    Attributes:
        path: the prepared checkpoint.
        storage: file system under it, and whether it is across a network.
        layers: loaded; ``all_layers`` are there.
        nbytes: of the layers' big tensors, as stored.
        all_nbytes: of all layers.
        tp, ep: sizes.
        devices: of the ranks in order.
        threads: reading threads a rank.
        together: whether tensor-parallel ranks read each byte once and exchanged columns; ``alone_because`` if not.
        figures: cold first.
    """

    path: Path
    storage: str
    layers: int
    all_layers: int
    nbytes: int
    all_nbytes: int
    tp: int
    ep: int
    devices: tuple[str, ...]
    threads: int
    together: bool
    alone_because: str
    figures: tuple[LoadFigures, ...]

    def gb_per_s(self, figures: LoadFigures) -> float:
        """Return the host's rate over the layers' stored bytes, in 10^9 bytes a second."""
        return self.nbytes / figures.median_s / 1e9 if figures.median_s else 0.0

    def whole_model_s(self, figures: LoadFigures) -> float:
        """Return the seconds that all layers' experts would take at this rate."""
        return self.all_nbytes / self.nbytes * figures.median_s

    def to_dict(self) -> dict[str, Any]:
        """Return the value for ``--json``."""
        return {
            "path": str(self.path),
            "storage": self.storage,
            "layers": self.layers,
            "all_layers": self.all_layers,
            "nbytes": self.nbytes,
            "all_nbytes": self.all_nbytes,
            "tp": self.tp,
            "ep": self.ep,
            "devices": list(self.devices),
            "threads": self.threads,
            "together": self.together,
            "alone_because": self.alone_because,
            "figures": [self._figures_value(figures) for figures in self.figures],
        }

    def _figures_value(self, figures: LoadFigures) -> dict[str, Any]:
        return {
            "cold": figures.cold,
            "cached_share": figures.cached_share,
            "seconds": list(figures.seconds),
            "median_s": figures.median_s,
            "gb_per_s": self.gb_per_s(figures),
            "read_nbytes": figures.read_nbytes,
            "reads": figures.reads,
            "whole_model_s": self.whole_model_s(figures),
            "limit": str(figures.limit),
            "advice": figures.limit.advice,
            "ranks": [rank.to_dict() for rank in figures.ranks],
        }


def find_limit(ranks: Sequence[RankTurn], seconds: float, cores: int) -> Limit:
    """Return what a turn waited for, judged by what its threads did.

    Args:
        ranks: of the turn.
        seconds: from the first rank's begin to the last one's end.
        cores: that this process may use.
    """
    of_threads = sum(rank.threads * rank.seconds for rank in ranks) or 1.0
    copying = sum(rank.copy_s for rank in ranks)
    reading = max(0.0, sum(rank.cpu_s for rank in ranks) - copying)  # a thread spins until its copy has arrived
    waiting = copying + sum(rank.wait_s for rank in ranks)
    blocked = max(0.0, sum(rank.read_s for rank in ranks) - reading)
    if reading >= waiting and reading + copying >= _MOSTLY * min(cores * seconds, of_threads):
        return Limit.CORES if reading + copying >= _MOSTLY * cores * seconds else Limit.ONE_THREAD
    shares = {Limit.STORAGE: blocked, Limit.COPIES: waiting}
    if len(ranks) > 1:
        shares[Limit.RANKS] = of_threads - reading - waiting - blocked
    if sum(rank.threads for rank in ranks) > cores and blocked < of_threads / 2:
        return Limit.CORES  # threads wait for a core, which counts as neither
    return max(shares, key=lambda limit: shares[limit])
