"""One reading thread with its staging buffers and its stream."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from nvfp4_prep.errors import LoadError, NvfpPrepError, VerificationError
from nvfp4_prep.load.options import LoadOptions
from nvfp4_prep.load.plan import Chunk, Task
from nvfp4_prep.load.reader import FileReader, ReadCounts

__all__ = ["Job", "Worker", "WorkerTimes", "as_load_error"]


@dataclass(frozen=True)
class Job:
    """A task and where its bytes go.

    Attributes:
        task: what to read.
        reader: the open file.
        target: the whole parameter, flat ``uint8``, on its device.
        ready: event on the stream that owns the parameter's memory; None on the CPU.
    """

    task: Task
    reader: FileReader
    target: torch.Tensor
    ready: torch.cuda.Event | None


@dataclass
class WorkerTimes:
    """Where a thread's time went, in seconds.

    Attributes:
        read: in system calls and gathering.
        wait: until a staging buffer was free again, which is the bus.
        copy: handing copies to the driver.
        cpu: processor time of the thread.
    """

    read: float = 0.0
    wait: float = 0.0
    copy: float = 0.0
    cpu: float = 0.0

    def add(self, other: WorkerTimes) -> None:
        """Adds another thread's times."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass
class _Buffer:
    bytes: torch.Tensor
    event: torch.cuda.Event | None
    busy: bool = False


@dataclass
class Worker:
    """State of one thread; :meth:`run` is called by that thread only.

    Attributes:
        device: of the parameters.
        staging: ``uint8``, pinned where the device is a GPU: ``options.buffers`` buffers.
        progress: told the bytes that were handed on.
    """

    device: torch.device
    options: LoadOptions
    staging: torch.Tensor
    progress: Callable[[int], None]
    counts: ReadCounts = field(default_factory=ReadCounts)
    times: WorkerTimes = field(default_factory=WorkerTimes)

    def __post_init__(self) -> None:
        self._cuda = self.device.type == "cuda"
        self._scratch: torch.Tensor | None = None
        self._next = 0
        self._ready: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        size = self.options.buffer_nbytes
        self._buffers = [
            _Buffer(self.staging[begin : begin + size], self._event()) for begin in range(0, len(self.staging), size)
        ]

    def _event(self) -> torch.cuda.Event | None:
        # Threads that wait for the bus must not take the cores of those that read: blocking events.
        return torch.cuda.Event(blocking=True) if self._cuda else None

    def start(self) -> None:
        """Makes this thread's stream its current one."""
        if self._cuda:
            torch.cuda.set_device(self.device)
            self._stream = torch.cuda.Stream(self.device)
            torch.cuda.set_stream(self._stream)

    def run(self, job: Job) -> None:
        """Reads a task into its parameter.

        Raises:
            LoadError: if the file cannot be read.
            VerificationError: if a checksum differs.
        """
        if job.ready is not None and job.ready is not self._ready and self._stream is not None:
            self._stream.wait_event(job.ready)
            self._ready = job.ready
        crc32 = 0
        for chunk in job.task.chunks:
            buffer = self._free_buffer() if self._staged(chunk, job) else None
            target = job.target[chunk.destination_bytes : chunk.destination_bytes + chunk.nbytes]
            into = target if buffer is None else buffer.bytes
            begun = time.perf_counter()
            if chunk.window is None:
                lead = job.reader.fill(job.task.tensor, chunk, into, self._scratch_bytes(chunk), self.counts)
            else:
                scratch = self._scratch_bytes(chunk)
                crc32 = job.reader.fill_window(job.task.tensor, chunk, into, scratch, crc32, self.counts)
                lead = 0
            read = time.perf_counter()
            self.times.read += read - begun
            if buffer is not None and chunk.nbytes:
                self._hand_on(buffer, lead, target, job)
                self.times.copy += time.perf_counter() - read
            self.progress(chunk.nbytes)
        if job.task.crc32 is not None and crc32 != job.task.crc32:
            raise VerificationError(
                f"expert {job.task.expert} does not have the bytes that were converted",
                where=f"{job.task.path}, tensor {job.task.tensor!r}",
                expected=f"CRC-32 {job.task.crc32:08x}",
                actual=f"{crc32:08x}",
                next_step="The file is damaged: download or convert it again.",
            )

    def finish(self) -> None:
        """Waits until everything handed on has arrived."""
        if self._stream is not None:
            self._stream.synchronize()
        for buffer in self._buffers:
            buffer.busy = False

    def _staged(self, chunk: Chunk, job: Job) -> bool:
        # A parameter in host memory is read into in place, but for direct I/O, which wants aligned memory.
        return self._cuda or (job.reader.direct and chunk.window is None)

    def _free_buffer(self) -> _Buffer:
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if buffer.busy and buffer.event is not None:
            begun = time.perf_counter()
            buffer.event.synchronize()
            self.times.wait += time.perf_counter() - begun
        return buffer

    def _hand_on(self, buffer: _Buffer, lead: int, target: torch.Tensor, job: Job) -> None:
        if buffer.event is None:
            # Not torch's copy_, which would start a thread pool of its own in every one of our threads.
            ctypes.memmove(target.data_ptr(), buffer.bytes.data_ptr() + lead, len(target))
            return
        try:
            target.copy_(buffer.bytes[lead : lead + len(target)], non_blocking=True)
            buffer.event.record(self._stream)
            buffer.busy = True
        except RuntimeError as error:
            raise LoadError(
                f"copy to {self.device} failed ({error})", where=f"{job.task.path}, tensor {job.task.tensor!r}"
            ) from error

    def _scratch_bytes(self, chunk: Chunk) -> torch.Tensor:
        """Pageable memory for what is read but not loaded; made when the first chunk needs it."""
        if self._scratch is None:
            needed = chunk.window is not None or any(not segment.contiguous for segment in chunk.segments)
            if not needed:
                return self.staging[:0]
            self._scratch = torch.empty(self.options.buffer_nbytes, dtype=torch.uint8)
        return self._scratch


def as_load_error(error: BaseException, task: Task) -> NvfpPrepError:
    """Any failure of a task as an error that names file and tensor."""
    if isinstance(error, NvfpPrepError):
        return error
    where = f"{task.path}, tensor {task.tensor!r}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return LoadError("out of memory while loading", where=where, actual=str(error).split("\n")[0])
    return LoadError(f"{type(error).__name__}: {error}", where=where)
