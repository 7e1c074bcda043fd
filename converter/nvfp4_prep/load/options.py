"""Options of a load: threads, staging, direct I/O, checksums. None of them changes what arrives."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nvfp4_prep._util.limits import usable_cores
from nvfp4_prep.errors import UsageError
from nvfp4_prep.load.read_plan import ALIGNMENT, LONG_RUN_NBYTES

__all__ = ["DirectIO", "Gather", "LoadOptions", "default_threads", "rank_threads"]

MAX_THREADS, MAX_BUFFERS, MAX_CHUNK_NBYTES = 1024, 65536, 1 << 30
"""More is a mistake: 12 threads saturate the bus."""
_CHUNK_NBYTES = 4 * 1024 * 1024


class DirectIO(enum.StrEnum):
    """Use of direct I/O: whether long ranges are read past the page cache.

    ``auto`` does so where the file is not in it, but for whole rows that a tensor-parallel rank slices by itself: the
    other ranks of the host need them too, and find them in the page cache.
    """

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Gather(enum.StrEnum):
    """The way in which short runs (a tensor-parallel rank's columns of w2, tiles of its scales) leave a file.

    ``rows`` reads whole rows in long ranges and slices them on the device; ``mmap`` copies the runs out of a mapping of
    the file. ``auto`` reads rows, in requests of megabytes, unless the file is in the page cache, not on network
    storage, and the runs are at most a quarter of the rows: then nothing is requested from storage, and whole rows
    would only fill the bus with other ranks' columns. From memory, all ranks of a host at once on two H100, rows
    loaded 28.7 GB/s and mappings 25.3 for TP 2, 18.1 and 28.0 for TP 4, 16.7 and 38.4 for TP 8.
    """

    AUTO = "auto"
    ROWS = "rows"
    MMAP = "mmap"


def default_threads(cores: int) -> int:
    """Return the reading threads for so many cores: three quarters, twelve at most.

    On 16 cores beside an H200, 8, 10, 12, 14 and 16 threads loaded 38.6, 41.5, 42.9, 38.7 and 30.4 GB/s, while
    two more threads handed on the copies.
    """
    return max(2, min(12, cores * 3 // 4))


def rank_threads(ranks: int) -> int:
    """Return the reading threads of one of the ranks that load on this host at once: its part of the cores, or one.

    Eight ranks with 12 threads each on 32 cores loaded 19 GB/s together, with 3 threads each 28 GB/s.
    """
    cores = usable_cores() // max(1, ranks)
    return default_threads(cores) if cores > 1 else 1


@dataclass(frozen=True)
class LoadOptions:
    """Options of a loader.

    Attributes:
        threads: reading threads; 0 means :func:`default_threads`.
        chunk_nbytes: size of one staging buffer, a multiple of 4096 and at least 64 KiB; 0 means 4 MiB. Resolved when
            made.
        buffers: staging buffers in all; 0 means one a thread, which fills it and copies it in turn. Pinned memory is
            ``buffers * (chunk_nbytes + 8 KiB)``, 48 MiB for 12 threads; more than the processor's caches hold makes
            loading slower, smaller chunks as well, because Python then has more to do: 12 threads each beside two H100
            loaded 43.5, 60.5 and 43.6 GB/s together with one buffer of 2, 4 and 8 MiB, and 47.0 with two of 4 MiB.
        direct_io: see :class:`DirectIO`.
        gather: see :class:`Gather`.
        verify: compare every expert's stored bytes with the manifest's checksums while they pass through memory.
    """

    threads: int = 0
    chunk_nbytes: int = 0
    buffers: int = 0
    direct_io: DirectIO = DirectIO.AUTO
    verify: bool = False
    gather: Gather = Gather.AUTO

    def __post_init__(self) -> None:
        """Check what may come from a command line (vLLM's ``--model-loader-extra-config``).

        Raises:
            UsageError: if a value is of another type, or unusable.
        """
        kinds = {"threads": int, "chunk_nbytes": int, "buffers": int, "verify": bool}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if type(value) is not kind:
                raise UsageError(f"unusable option {name}", expected=f"of type {kind.__name__}", actual=repr(value))
        if self.threads < 0 or self.buffers < 0:
            raise UsageError("threads and buffers cannot be negative", actual=str(self))
        if self.threads > MAX_THREADS or self.buffers > MAX_BUFFERS or self.chunk_nbytes > MAX_CHUNK_NBYTES:
            raise UsageError(
                "unusable option of the loader",
                expected=f"at most {MAX_THREADS} threads, {MAX_BUFFERS} buffers, {MAX_CHUNK_NBYTES} bytes a chunk",
                actual=str(self),
            )
        if self.chunk_nbytes == 0:
            object.__setattr__(self, "chunk_nbytes", _CHUNK_NBYTES)
        if self.chunk_nbytes < LONG_RUN_NBYTES or self.chunk_nbytes % ALIGNMENT:
            raise UsageError(
                "unusable staging buffer size",
                expected=f"a multiple of {ALIGNMENT} of at least {LONG_RUN_NBYTES} bytes",
                actual=self.chunk_nbytes,
            )
        for name, choices in (("direct_io", DirectIO), ("gather", Gather)):
            value = getattr(self, name)
            if value not in [*choices]:
                raise UsageError(f"unusable option {name}", expected=" or ".join(choices), actual=repr(value))
            object.__setattr__(self, name, choices(value))

    @property
    def thread_count(self) -> int:
        """Threads, with the default resolved for this machine."""
        return self.threads or default_threads(usable_cores())

    @property
    def buffer_count(self) -> int:
        """Staging buffers, with the default resolved."""
        return self.buffers or self.thread_count

    @property
    def staging_nbytes(self) -> int:
        """Pinned host memory that a loader for a GPU holds."""
        return self.buffer_count * self.buffer_nbytes

    @property
    def buffer_nbytes(self) -> int:
        """One staging buffer: a chunk, and what direct I/O needs around an unaligned one."""
        return self.chunk_nbytes + 2 * ALIGNMENT
