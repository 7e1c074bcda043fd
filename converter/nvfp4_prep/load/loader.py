"""Fills parameters from files with many threads: the engine under ``load_layer`` and the vLLM load format."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from nvfp4_prep.errors import LoadError, NvfpPrepError
from nvfp4_prep.load.options import DirectIO, LoadOptions
from nvfp4_prep.load.plan import ALIGNMENT, plan_reads
from nvfp4_prep.load.reader import FileReader, ReadCounts
from nvfp4_prep.load.worker import Job, Worker, WorkerTimes, as_load_error
from nvfp4_prep.safetensors_io import TensorRecord
from nvfp4_prep.units import format_nbytes
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["ExpertLoader", "LoadReport"]


@dataclass(frozen=True)
class LoadReport:
    """What one load did, from the first :meth:`ExpertLoader.submit` to the end of :meth:`ExpertLoader.finish`.

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
    times: WorkerTimes
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


class ExpertLoader:
    """Loads parameters on one device. :meth:`submit` queues, :meth:`finish` waits and raises.

    Staging memory is allocated once and used for every load of this loader: ``options.staging_nbytes`` of pinned host
    memory for a GPU (144 MiB with the defaults on 16 cores); nothing on the device. A load that failed is void:
    :meth:`finish` raises, and none of the parameters submitted since the last one may be used.
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
            progress: called with numbers of bytes, from several threads.

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
        self._error: NvfpPrepError | None = None
        self._closed = False
        self._begin()
        self._workers = self._make_workers()
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"nvfp4-load-{number}", daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ExpertLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
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
        reader = self._reader(path, record, experts)
        checks = crc32 if self.options.verify else None
        if self.options.verify and crc32 is None:
            raise LoadError("the manifest has no checksums to verify against", where=f"{path}, tensor {record.name!r}")
        target = parameter.detach().view(torch.uint8).view(-1)
        ready = torch.cuda.current_stream(self.device).record_event() if target.is_cuda else None
        tasks = plan_reads(path, record, part, experts, self.options.chunk_nbytes, checks)
        with self._state:
            if self._pending == 0 and self._submitted == 0:
                self._begun = time.perf_counter()
            self._pending += len(tasks)
            self._submitted += target.numel()
        for task in tasks:
            self._jobs.put(Job(task, reader, target, ready))

    def finish(self) -> LoadReport:
        """Waits for everything queued and says what it took.

        Raises:
            LoadError, VerificationError: the first failure; all parameters since the last call are void.
        """
        with self._state:
            while self._pending:
                self._state.wait()
        for worker in self._workers:
            worker.finish()
        seconds = time.perf_counter() - self._begun
        error, submitted = self._error, self._submitted
        counts, times = ReadCounts(), WorkerTimes()
        for worker in self._workers:
            counts.add(worker.counts)
            times.add(worker.times)
            worker.counts, worker.times = ReadCounts(), WorkerTimes()
        self._begin()
        self._close_readers()
        if error is not None:
            raise error
        return LoadReport(seconds if submitted else 0.0, submitted, counts, times, len(self._workers))

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
        self._close_readers()
        self._workers = []

    def _begin(self) -> None:
        self._error = None
        self._submitted = 0
        self._begun = time.perf_counter()

    def _make_workers(self) -> list[Worker]:
        options, pinned = self.options, self.device.type == "cuda"
        try:
            slab = torch.empty(options.staging_nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise LoadError(
                f"{format_nbytes(options.staging_nbytes)} of {'pinned ' if pinned else ''}staging memory refused"
                f" ({str(error).splitlines()[0]})",
                next_step="Use fewer threads, fewer or smaller buffers.",
            ) from error
        lead = -slab.data_ptr() % ALIGNMENT
        size = options.buffers * options.buffer_nbytes
        ends = range(lead + size, lead + options.staging_nbytes + 1, size)
        return [Worker(self.device, options, slab[end - size : end], self._advance) for end in ends]

    def _advance(self, nbytes: int) -> None:
        if self._progress is not None:
            self._progress(nbytes)

    def _work(self, worker: Worker) -> None:
        started = False
        while True:
            job = self._jobs.get()
            if job is None:
                return
            failure: NvfpPrepError | None = None
            if self._error is None:
                before = time.thread_time()
                try:
                    if not started:
                        worker.start()
                        started = True
                    worker.run(job)
                except BaseException as error:
                    # Kept for finish(), which raises it in the caller's thread; the other tasks are dropped.
                    failure = as_load_error(error, job.task)
                    failure.__cause__ = failure.__cause__ or (None if failure is error else error)
                worker.times.cpu += time.thread_time() - before
            with self._state:
                self._error = self._error or failure
                self._pending -= 1
                if not self._pending:
                    self._state.notify_all()

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
