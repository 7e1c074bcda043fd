"""The work of one reading thread: filling staging buffers, or parameters in host memory, task by task."""

from __future__ import annotations

import ctypes
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import torch

from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep.errors import LoadError, NvfpPrepError, VerificationError
from nvfp4_prep.load.gpu_copy import Copies, CopyError
from nvfp4_prep.load.read_plan import Chunk, Task
from nvfp4_prep.load.reader import FileReader, ReadCounts
from nvfp4_prep.load.strided_copy import gather_runs
from nvfp4_prep.prepared.problems import renewal

__all__ = ["Buffers", "Job", "Reading", "Submission", "Times", "as_load_error"]


@dataclass(slots=True)
class Submission:
    """One parameter of a load; ``pending`` counts what is still to arrive (:attr:`Task.units`), under a lock."""

    pending: int


@dataclass(frozen=True, slots=True)
class Job:
    """A task and where its bytes go.

    Attributes:
        task: what to read.
        reader: the open file.
        targets: for each chunk its part of the parameter, flat ``uint8``; None where the chunk fills nothing.
        ready: event on the stream that owns the parameter's memory; None on the CPU.
        submission: what the task belongs to.
        pieces: begins of the pieces of a long range that no thread has taken yet, one iterator for all of them: a
            range's is advanced in one step of the interpreter. None where one thread does the whole task.
    """

    task: Task
    reader: FileReader
    targets: tuple[torch.Tensor | None, ...]
    ready: torch.cuda.Event | None
    submission: Submission
    pieces: Iterator[int] | None = None

    def piece(self, begin: int, limit: int) -> tuple[int, int]:
        """Return offset in the file and size of the piece that begins there, of at most ``limit`` bytes."""
        segment = self.task.chunks[0].segments[0]
        offset = max(begin, segment.offset_bytes)
        return offset, min(begin + limit, segment.offset_bytes + segment.nbytes) - offset

    def drop_pieces(self, limit: int) -> int:
        """Take all pieces that are left and return their bytes: 0 unless the load failed."""
        return sum(self.piece(begin, limit)[1] for begin in self.pieces or ())


@dataclass
class Times:
    """Seconds by what the threads did, summed over the threads.

    Attributes:
        read: in system calls, gathering and checksums, and until Python ran again after them.
        wait: until a staging buffer was free; 0 where every thread has one.
        copy: in copies to the GPU, until the bytes had arrived.
        cpu: processor time.
    """

    read: float = 0.0
    wait: float = 0.0
    copy: float = 0.0
    cpu: float = 0.0

    def add(self, other: Times) -> None:
        """Add another thread's times."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


class Buffers:
    """Staging memory in equal parts, each of one reading thread. Peak memory: ``slab``.

    A thread fills the same buffer again and again: the processor's caches still have it, and copying out of the page
    cache takes three quarters of the time it takes into a buffer that another core filled last.

    Attributes:
        bytes: one tensor a buffer.
        chunk_nbytes: size of a chunk.
        views: :attr:`bytes` for system calls. Made once: making one takes as long as reading 100 kB.
        addresses: of :attr:`bytes`.
    """

    def __init__(self, slab: torch.Tensor, nbytes: int, chunk_nbytes: int, threads: int) -> None:
        """Divide ``slab`` among threads.

        Args:
            slab: ``uint8``, page-aligned.
            nbytes: size of one buffer.
            chunk_nbytes: size of one chunk.
            threads: reading threads; with fewer buffers than threads, several threads share one.
        """
        self.bytes = [slab[begin : begin + nbytes] for begin in range(0, len(slab) - nbytes + 1, nbytes)]
        self.chunk_nbytes = chunk_nbytes
        self.views = [byte_view(buffer) for buffer in self.bytes]
        self.addresses = [buffer.data_ptr() for buffer in self.bytes]
        self._free: list[queue.SimpleQueue[int]] = [queue.SimpleQueue() for _ in range(min(threads, len(self.bytes)))]
        for number in range(len(self.bytes)):
            self.give_back(number)

    def take(self, thread: int) -> int:
        """Wait for a free buffer of a thread and return its number."""
        return self._free[thread % len(self._free)].get()

    def give_back(self, number: int) -> None:
        """Make a buffer free again, for the thread that it belongs to."""
        self._free[number % len(self._free)].put(number)


@dataclass
class Reading:
    """One reading thread; :meth:`run` is called by that thread only.

    Attributes:
        thread: its number, from 0.
        buffers: of all threads.
        scratch_nbytes: size of this thread's pageable buffer for what is read but not loaded.
        copies: take what is staged to a GPU; None for parameters in host memory.
        done: told which job's parameter has so many more bytes.
        failed: whether the load has failed, so that there is nothing to do any more.
        left: of what the last :meth:`run` took, what did not arrive; and 1 for a checksum, right or wrong.
    """

    thread: int
    buffers: Buffers
    scratch_nbytes: int
    copies: Copies | None
    done: Callable[[Job, int], None]
    failed: Callable[[], bool]
    counts: ReadCounts = field(default_factory=ReadCounts)
    times: Times = field(default_factory=Times)
    left: int = 0
    _scratch: torch.Tensor | None = None

    def run(self, job: Job) -> None:
        """Read a task, or those pieces of it that no other thread takes.

        Raises:
            LoadError: if the file cannot be read.
            CopyError: if a copy to the GPU fails.
            VerificationError: if a checksum differs.
        """
        if job.pieces is not None:
            self._run_pieces(job, job.pieces)
            return
        crc32, self.left = 0, job.task.units
        for chunk, target in zip(job.task.chunks, job.targets, strict=True):
            buffer = self._buffer() if self._staged(chunk, job) else None
            try:
                lead, crc32 = self._fill(job, chunk, target, buffer, crc32)
                if buffer is not None and target is not None:
                    self._take(job, chunk, buffer, lead, target)
            finally:
                if buffer is not None:
                    self.buffers.give_back(buffer)
            self._arrived(job, chunk.nbytes)
        if job.task.crc32 is not None and crc32 != job.task.crc32:
            raise VerificationError(
                f"expert {job.task.expert} does not have the bytes that were converted",
                where=f"{job.task.path}, tensor {job.task.tensor!r}",
                expected=f"CRC-32 {job.task.crc32:08x}",
                actual=f"{crc32:08x}",
                next_step=renewal(job.task.path.name),
            )

    def _run_pieces(self, job: Job, pieces: Iterator[int]) -> None:
        """Do the usual work with as little Python as possible: all threads wait for the GIL."""
        self.left = 0
        target, tensor, limit = job.targets[0], job.task.tensor, self.buffers.chunk_nbytes
        if target is None:
            raise ValueError("a long range has a place")
        first, address = job.task.chunks[0].segments[0].offset_bytes, target.data_ptr()
        view = None if self.copies is not None else byte_view(target)
        for begin in pieces:
            offset, nbytes = job.piece(begin, limit)
            self.left = nbytes
            if self.failed():
                return
            if view is not None:
                self._read(job, tensor, offset, view[offset - first : offset - first + nbytes], nbytes)
            else:
                self._stage_piece(job, offset, nbytes, address + offset - first)
            self._arrived(job, nbytes)

    def _stage_piece(self, job: Job, offset: int, nbytes: int, address: int) -> None:
        buffer = self._buffer()
        try:
            self._read(job, job.task.tensor, offset, self.buffers.views[buffer], nbytes)
            if self.copies is not None:
                begun = time.perf_counter()
                self.copies.copy(self.buffers.addresses[buffer], address, nbytes, job.ready)
                self.times.copy += time.perf_counter() - begun
        finally:
            self.buffers.give_back(buffer)

    def _read(self, job: Job, tensor: str, offset: int, view: memoryview, nbytes: int) -> None:
        begun = time.perf_counter()
        job.reader.read(tensor, offset, view, nbytes, self.counts)
        self.times.read += time.perf_counter() - begun

    def _arrived(self, job: Job, nbytes: int) -> None:
        self.left -= nbytes
        self.done(job, nbytes)

    def _take(self, job: Job, chunk: Chunk, buffer: int, lead: int, target: torch.Tensor) -> None:
        """Copy out of staging: all of it, or the runs of a chunk that is sliced."""
        cut = chunk.segments[0] if chunk.sliced else None
        begun, source = time.perf_counter(), self.buffers.addresses[buffer] + lead
        if self.copies is None:
            if cut is not None:
                runs = self.buffers.bytes[buffer]
                gather_runs(runs, lead, cut.run_nbytes, cut.stride_bytes, cut.runs, target)
            else:
                # Not torch's copy_, which would start a thread pool of its own in every one of our threads.
                ctypes.memmove(target.data_ptr(), source, chunk.nbytes)
            return
        if cut is not None:
            self.copies.copy_runs(source, cut, target, job.ready)
        else:
            self.copies.copy(source, target.data_ptr(), chunk.nbytes, job.ready)
        self.times.copy += time.perf_counter() - begun

    def _staged(self, chunk: Chunk, job: Job) -> bool:
        # A parameter in host memory is read into in place, but for whole rows, and for direct I/O, which wants aligned
        # memory.
        return self.copies is not None or chunk.sliced or (job.reader.direct and chunk.window is None)

    def _buffer(self) -> int:
        begun = time.perf_counter()
        buffer = self.buffers.take(self.thread)
        self.times.wait += time.perf_counter() - begun
        return buffer

    def _fill(
        self, job: Job, chunk: Chunk, target: torch.Tensor | None, buffer: int | None, crc32: int
    ) -> tuple[int, int]:
        begun = time.perf_counter()
        into = self.buffers.bytes[buffer] if buffer is not None else target
        into = self.buffers.bytes[0][:0] if into is None else into
        lead = 0
        if chunk.sliced:
            lead = job.reader.read_span(job.task.tensor, chunk.segments[0], into, self.counts)
        elif chunk.window is None:
            lead = job.reader.fill(job.task.tensor, chunk, into, self.counts)
        else:
            scratch = self._scratch_bytes()
            crc32 = job.reader.fill_window(job.task.tensor, chunk, into, scratch, crc32, self.counts)
        self.times.read += time.perf_counter() - begun
        return lead, crc32

    def _scratch_bytes(self) -> torch.Tensor:
        """Made when the first chunk with a window needs it."""
        if self._scratch is None:
            self._scratch = torch.empty(self.scratch_nbytes, dtype=torch.uint8, device="cpu")
        return self._scratch


def as_load_error(error: BaseException, task: Task) -> NvfpPrepError:
    """Any failure of a task as an error that names file and tensor."""
    if isinstance(error, NvfpPrepError):
        return error
    where = f"{task.path}, tensor {task.tensor!r}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return LoadError("out of memory while loading", where=where, actual=str(error).split("\n")[0])
    if isinstance(error, CopyError):
        return LoadError(str(error), where=where)
    return LoadError(f"{type(error).__name__}: {error}", where=where)
