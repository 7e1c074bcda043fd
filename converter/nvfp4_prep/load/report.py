"""Report of a load."""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.load.reader import ReadCounts
from nvfp4_prep.load.worker import Times

__all__ = ["LoadReport"]


@dataclass(frozen=True)
class LoadReport:
    """Report of one load, from the first :meth:`ExpertLoader.submit` to the end of :meth:`ExpertLoader.finish`.

    Attributes:
        seconds: wall time.
        nbytes: bytes of the parameters.
        counts: bytes and system calls.
        times: summed over the threads, in seconds.
        threads: how many.
    """

    seconds: float
    nbytes: int
    counts: ReadCounts
    times: Times
    threads: int

    @property
    def gb_per_s(self) -> float:
        """Bytes of the parameters in 10^9 a second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{format_nbytes(self.nbytes)} in {self.seconds:.2f} s ({self.gb_per_s:.1f} GB/s), "
            f"{format_nbytes(self.counts.nbytes)} read in {self.counts.reads} reads"
        )
