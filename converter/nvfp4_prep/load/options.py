"""How to load: threads, staging, direct I/O, checksums. None of it changes what arrives."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass

from nvfp4_prep.errors import UsageError
from nvfp4_prep.load.plan import ALIGNMENT, LONG_RUN_NBYTES

__all__ = ["DirectIO", "LoadOptions"]


class DirectIO(enum.StrEnum):
    """Whether long ranges are read past the page cache: ``auto`` does so where the file is not in it."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def _default_threads() -> int:
    # Linux says how many cores this process may use; other systems how many there are.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(16, usable))


@dataclass(frozen=True)
class LoadOptions:
    """Options of a loader.

    Attributes:
        threads: reading threads; 0 means one for each usable core, between 2 and 16.
        chunk_nbytes: size of one staging buffer, a multiple of 4096 and at least 64 KiB.
        buffers: staging buffers in all; 0 means half as many again as threads. Pinned memory is
            ``buffers * (chunk_nbytes + 8 KiB)``; more than the processor's caches hold makes loading slower.
        direct_io: see :class:`DirectIO`.
        verify: compare every expert's stored bytes with the manifest's checksums while they pass through memory.
    """

    threads: int = 0
    chunk_nbytes: int = 8 * 1024 * 1024
    buffers: int = 0
    direct_io: DirectIO = DirectIO.AUTO
    verify: bool = False

    def __post_init__(self) -> None:
        if self.threads < 0 or self.buffers < 0:
            raise UsageError("threads and buffers cannot be negative", actual=str(self))
        if self.chunk_nbytes < LONG_RUN_NBYTES or self.chunk_nbytes % ALIGNMENT:
            raise UsageError(
                "unusable staging buffer size",
                expected=f"a multiple of {ALIGNMENT} of at least {LONG_RUN_NBYTES} bytes",
                actual=self.chunk_nbytes,
            )
        object.__setattr__(self, "direct_io", DirectIO(self.direct_io))

    @property
    def thread_count(self) -> int:
        """Threads, with the default resolved for this machine."""
        return self.threads or _default_threads()

    @property
    def buffer_count(self) -> int:
        """Staging buffers, with the default resolved."""
        return self.buffers or self.thread_count * 3 // 2

    @property
    def staging_nbytes(self) -> int:
        """Pinned host memory that a loader for a GPU holds."""
        return self.buffer_count * self.buffer_nbytes

    @property
    def buffer_nbytes(self) -> int:
        """One staging buffer: a chunk, and what direct I/O needs around an unaligned one."""
        return self.chunk_nbytes + 2 * ALIGNMENT
