"""Fills parameters from files with many threads: the engine under ``load_layer`` and the vLLM load format."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch

from nvfp4_prep.errors import LoadError, NvfpPrepError
from nvfp4_prep.load.options import DirectIO, LoadOptions
from nvfp4_prep.load.plan import ALIGNMENT, Task, plan_reads
from nvfp4_prep.load.reader import FileReader, ReadCounts
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.load.transfer import Transfer
from nvfp4_prep.load.worker import Buffers, Filled, Job, Reading, Times, as_load_error
from nvfp4_prep.safetensors_io import TensorRecord
from nvfp4_prep.units import format_nbytes
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["ExpertLoader"]


class ExpertLoader:
    """Loads parameters on one device. :meth:`submit` queues, :meth:`finish` waits and raises.

    Staging memory is allocated once and used for every load of this loader: ``options.staging_nbytes`` of pinned host
    memory for a GPU; nothing on the device. A load that failed is void: :meth:`finish` raises, and none of the
    parameters submitted since the last one may be used.
    """

    def __init__(
        self,
        device: torch.device | str,
        options: LoadOptions | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Allocates staging and starts the threads.

        Args:
            device: CPU or CUDA device of the parameters.
            options: defaults for this machine if left out.
            progress: called with numbers of bytes that arrived, from several threads; an error in it ends the load.

        Raises:
            LoadError: if the device is of another kind or staging memory is refused.
        """
        self.options = options or LoadOptions()
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise LoadError("cannot load to this device", expected="cpu or cuda", actual=self.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._progress = progress
        self._readers: dict[Path, FileReader] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._state = threading.Condition()
        self._pending = 0
        self._closed = False
        self._error: NvfpPrepError | None = None
        self._begin()
        buffers = self._make_buffers()
        self._transfer = (
            Transfer(self.device, buffers, self._arrived, self._driver_failed) if self.device.type == "cuda" else None
        )
        filled = None if self._transfer is None else self._transfer.put
        self._reading = [
            Reading(buffers, self.options.buffer_nbytes, filled, lambda nbytes: self._arrived(1, nbytes))
            for _ in range(self.options.thread_count)
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(reading,), name=f"nvfp4-load-read-{number}", daemon=True)
            for number, reading in enumerate(self._reading)
        ]
        for thread in self._threads:
            thread.start()
        self._cpu = self._cpu_seconds()

    def __enter__(self) -> ExpertLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._closed:
                self.finish()
        finally:
            self.close()

    def submit(
        self,
        path: Path,
        record: TensorRecord,
        part: ExpertSlice,
        experts: Sequence[int],
        parameter: torch.Tensor,
        crc32: Sequence[int] | None = None,
    ) -> None:
        """Queues the load of one parameter.

        Args:
            path: the prepared file.
            record: the stored tensor, ``[E, …]``.
            part: the rank's share of one expert (:func:`nvfp4_prep_kernels.rank_slice`).
            experts: the stored expert of each slot.
            parameter: one-byte elements, ``[len(experts), *part.shape]``, contiguous, on the loader's device.
            crc32: the manifest's checksums, compared if the options say ``verify``.

        Raises:
            LoadError: if the parameter or the experts do not fit, or the file cannot be opened.
        """
        if self._closed:
            raise LoadError("the loader is closed", where=record.name)
        self._check(record, part, experts, parameter)
        if self.options.verify and crc32 is None:
            raise LoadError("the manifest has no checksums to verify against", where=f"{path}, tensor {record.name!r}")
        reader = self._reader(path, record, experts)
        checks = crc32 if self.options.verify else None
        target = parameter.detach().view(torch.uint8).view(-1)
        ready = torch.cuda.current_stream(self.device).record_event() if target.is_cuda else None
        tasks = plan_reads(path, record, part, experts, self.options.chunk_nbytes, checks)
        places = _places(target, tasks)
        with self._state:
            if self._submitted == 0:
                self._begun = time.perf_counter()
            self._pending += sum(task.units for task in tasks)
            self._submitted += target.numel()
        for task in tasks:
            self._jobs.put(
                Job(
                    task,
                    reader,
                    tuple(places.get(chunk.destination_bytes) if chunk.nbytes else None for chunk in task.chunks),
                    ready,
                )
            )

    def finish(self) -> LoadReport:
        """Waits for everything queued and says what it took.

        Raises:
            LoadError, VerificationError: the first failure; all parameters since the last call are void.
            LoadError: if the loader is closed.
        """
        if self._closed:
            raise LoadError("the loader is closed")
        with self._state:
            while self._pending:
                self._state.wait()
        seconds = time.perf_counter() - self._begun
        error, submitted = self._error, self._submitted
        counts, times = ReadCounts(), Times()
        for reading in self._reading:
            counts.add(reading.counts)
            times.add(reading.times)
            reading.counts, reading.times = ReadCounts(), Times()
        before, self._cpu = self._cpu, self._cpu_seconds()
        times.cpu = self._cpu - before
        if self._transfer is not None:
            times.submit, self._transfer.submit_s = self._transfer.submit_s, 0.0
        self._begin()
        self._close_readers()
        if error is not None:
            raise error
        return LoadReport(seconds if submitted else 0.0, submitted, counts, times, len(self._reading))

    def abandon(self) -> None:
        """Drops what is still queued and waits for what is under way; the parameters submitted so far are void."""
        with self._state:
            self._error = self._error or LoadError("the load was abandoned")
        with contextlib.suppress(NvfpPrepError):
            self.finish()

    def close(self) -> None:
        """Drops what is still queued, ends the threads and gives staging and files back."""
        if self._closed:
            return
        self._closed = True
        with self._state:
            self._error = self._error or LoadError("the loader was closed")
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        if self._transfer is not None:
            self._transfer.close()
        self._close_readers()
        self._reading, self._transfer = [], None  # which hold the staging memory

    def _begin(self) -> None:
        self._error = None
        self._submitted = 0
        self._begun = time.perf_counter()

    def _make_buffers(self) -> Buffers:
        options, pinned = self.options, self.device.type == "cuda"
        try:
            nbytes = options.staging_nbytes + ALIGNMENT
            slab = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        except RuntimeError as error:
            raise LoadError(
                f"{format_nbytes(options.staging_nbytes)} of {'pinned ' if pinned else ''}staging memory refused"
                f" ({str(error).splitlines()[0]})",
                next_step="Use fewer or smaller buffers.",
            ) from error
        lead = -slab.data_ptr() % ALIGNMENT
        staging = slab[lead : lead + options.staging_nbytes]
        return Buffers(staging, options.buffer_nbytes, options.chunk_nbytes)

    def _arrived(self, units: int, nbytes: int) -> None:
        failure = None
        if self._progress is not None and nbytes:
            try:
                self._progress(nbytes)
            except BaseException as error:
                # Raised here it would end the thread that gives buffers back, and finish() would wait for ever.
                failure = LoadError(f"progress could not be told ({type(error).__name__}: {error})")
                failure.__cause__ = error
        with self._state:
            self._error = self._error or failure
            self._pending -= units
            if not self._pending:
                self._state.notify_all()

    def _driver_failed(self, error: BaseException, filled: Filled) -> None:
        task = filled.job.task
        failure = LoadError(f"copy to {self.device} failed ({error})", where=f"{task.path}, tensor {task.tensor!r}")
        failure.__cause__ = error
        with self._state:
            self._error = self._error or failure

    def _work(self, reading: Reading) -> None:
        while (job := self._jobs.get()) is not None:
            units = job.task.units
            if self._error is None:
                try:
                    reading.run(job)
                    units -= len(job.task.chunks)
                except BaseException as error:
                    # Kept for finish(), which raises it in the caller's thread; the other tasks are dropped.
                    failure = as_load_error(error, job.task)
                    failure.__cause__ = failure.__cause__ or (None if failure is error else error)
                    with self._state:
                        self._error = self._error or failure
                    units -= reading.chunks_done
            if units:
                self._arrived(units, 0)

    def _cpu_seconds(self) -> float:
        """Processor time of the reading threads so far; 0 where the system does not say.

        Only while they live: the system call ends the process for a thread that has ended.
        """
        clock_of = getattr(time, "pthread_getcpuclockid", None)
        if clock_of is None:
            return 0.0
        return sum(time.clock_gettime(clock_of(thread.ident)) for thread in self._threads if thread.ident is not None)

    def _reader(self, path: Path, record: TensorRecord, experts: Sequence[int]) -> FileReader:
        reader = self._readers.get(path)
        if reader is None:
            mode = self.options.direct_io
            reader = FileReader(path, direct=mode is not DirectIO.NEVER)
            stored = record.nbytes // record.shape[0]
            first, last = min(experts), max(experts)
            if mode is DirectIO.AUTO and reader.cached(
                record.offset_bytes + first * stored, (last + 1 - first) * stored
            ):
                reader.direct = False
            self._readers[path] = reader
        if reader.nbytes < record.offset_bytes + record.nbytes:
            raise LoadError(
                "file is shorter than its header says",
                where=f"{path}, tensor {record.name!r}",
                expected=f"at least {record.offset_bytes + record.nbytes} bytes",
                actual=f"{reader.nbytes} bytes",
                next_step="The file is truncated: download it again.",
            )
        return reader

    def _close_readers(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _check(self, record: TensorRecord, part: ExpertSlice, experts: Sequence[int], parameter: torch.Tensor) -> None:
        where = f"{record.file}, tensor {record.name!r}"
        expected = (len(experts), *part.shape)
        if tuple(parameter.shape) != expected or parameter.element_size() != 1 or not parameter.is_contiguous():
            raise LoadError(
                "the parameter does not fit the rank's share",
                where=where,
                expected=f"contiguous {list(expected)} of one-byte elements",
                actual=f"{list(parameter.shape)} {parameter.dtype}, strides {list(parameter.stride())}",
            )
        if parameter.device != self.device:
            raise LoadError(
                "the parameter is on another device", where=where, expected=self.device, actual=parameter.device
            )
        stored = record.shape[0]
        wrong = [expert for expert in experts if not 0 <= expert < stored]
        if wrong or not experts:
            raise LoadError(
                "no such experts" if wrong else "no experts to load",
                where=where,
                expected=f"0 to {stored - 1}",
                actual=", ".join(map(str, wrong[:8])),
            )


def _places(target: torch.Tensor, tasks: Sequence[Task]) -> dict[int, torch.Tensor]:
    """Where each chunk goes, by its offset: one call for all, instead of one in the way of the reading threads."""
    chunks = sorted((chunk.destination_bytes, chunk.nbytes) for task in tasks for chunk in task.chunks if chunk.nbytes)
    parts = target.split([nbytes for _, nbytes in chunks])
    return {offset: part for (offset, _), part in zip(chunks, parts, strict=True)}
