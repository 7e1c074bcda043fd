"""The loader of parameters from files with many threads: under ``load_layer`` and the servers' load formats."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.errors import LoadError, NvfpPrepError, UsageError
from nvfp4_prep.load.accounts import Accounts
from nvfp4_prep.load.arguments import as_device, as_experts, check_parameter
from nvfp4_prep.load.gpu_copy import GpuCopies
from nvfp4_prep.load.mmap_gather import mapping_supported
from nvfp4_prep.load.numa import near_processors, run_near, stay_near
from nvfp4_prep.load.open_files import OpenFiles
from nvfp4_prep.load.options import Gather, LoadOptions
from nvfp4_prep.load.parameter_bytes import chunk_views, flat_bytes
from nvfp4_prep.load.read_plan import Task, pieces, plan_reads
from nvfp4_prep.load.reader import FileReader, ReadCounts
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.load.staging import make_buffers
from nvfp4_prep.load.worker import Job, Reading, Submission, Times, as_load_error
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["ExpertLoader"]

_THREADS = "nvfp4-load-"
_FEW_COLUMNS = 4
"""Ranks of a tensor-parallel group from which on whole rows of a file in memory cost more than gathering."""


class ExpertLoader:
    """A loader of parameters on one device. :meth:`submit` queues, :meth:`finish` waits and raises.

    Staging memory is allocated once and used for every load of this loader: ``options.staging_nbytes`` of pinned host
    memory for a GPU; on the device as much again, for whole rows that are sliced there. Staging and
    reading threads are kept on the GPU's NUMA node where that is known and has processors enough. A load that failed is
    void: :meth:`finish` raises, and none of the parameters submitted since the last one may be used.

    For one thread at a time, because the failure of a load is told once: from the first :meth:`submit` to the
    :meth:`finish` that belongs to it every call must come from the same thread, and another one's gets a
    :class:`LoadError`. :meth:`close` may be called by any thread; it ends a load that is under way.
    """

    def __init__(
        self,
        device: torch.device | str,
        options: LoadOptions | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Allocate staging and start the threads, which the public call has always done: :meth:`close` ends them.

        Args:
            device: CPU or CUDA device of the parameters.
            options: defaults for this machine if left out.
            progress: called with numbers of bytes that arrived, from several threads; an error in it ends the load.

        Raises:
            UsageError: if an argument is not what it should be.
            LoadError: if this machine does not have the device, or staging memory or threads are refused.
        """
        self.options = LoadOptions() if options is None else options
        if not isinstance(self.options, LoadOptions) or not (progress is None or callable(progress)):
            raise UsageError(
                "unusable argument", expected="LoadOptions and a callable", actual=f"{options}, {progress}"
            )
        self._device = as_device(device)
        self._progress = progress
        self._files = OpenFiles(self.options.direct_io)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._accounts = Accounts()
        self._call = threading.Lock()
        self._closed = False
        self._near = near_processors(self.device, self.options.thread_count)
        buffers = run_near(self._near, lambda: make_buffers(self.options, pinned=self.device.type == "cuda"))
        on_gpu = self.device.type == "cuda"
        self._reading = [
            Reading(
                number,
                buffers,
                self.options.buffer_nbytes,
                GpuCopies(self.device) if on_gpu else None,
                self._arrived,
                self._has_failed,
            )
            for number in range(self.options.thread_count)
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(reading,), name=f"{_THREADS}read-{number}", daemon=True)
            for number, reading in enumerate(self._reading)
        ]
        self._start_threads()
        self._cpu = self._cpu_seconds()

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self._device

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

    @contextlib.contextmanager
    def _called(self) -> Iterator[None]:
        """Admit one call at a time, and from one thread until the load is finished."""
        if not self._call.acquire(blocking=False):
            raise _in_use()
        try:
            if self._closed:
                raise LoadError("the loader is closed")
            if self._accounts.owner not in (None, threading.get_ident()):
                raise _in_use()
            yield
        finally:
            self._call.release()

    def submit(
        self,
        path: Path,
        record: TensorRecord,
        part: ExpertSlice,
        experts: Sequence[int],
        parameter: torch.Tensor,
        crc32: Sequence[int] | None = None,
    ) -> Submission:
        """Queue the load of one parameter.

        Args:
            path: the prepared file.
            record: the stored tensor, ``[E, …]``.
            part: the rank's share of one expert (:func:`nvfp4_prep_kernels.rank_slice`).
            experts: the stored expert of each slot.
            parameter: one-byte elements, ``[len(experts), *part.shape]``, contiguous, on the loader's device.
            crc32: the manifest's checksums, compared if the options say ``verify``.

        Returns:
            What :meth:`wait_for` takes.

        Raises:
            LoadError: if the parameter or the experts do not fit, the file cannot be opened, or another thread is
                using this loader.
        """
        with self._called():
            chosen = as_experts(experts)
            check_parameter(record, part, chosen, parameter, self.device)
            if self.options.verify and crc32 is None:
                raise LoadError(
                    "the manifest has no checksums to verify against", where=f"{path}, tensor {record.name!r}"
                )
            reader = self._files.reader(path, record, chosen)
            checks = crc32 if self.options.verify else None
            mapped = self._maps(reader, part)
            limit, divided = self.options.chunk_nbytes, not reader.direct
            tasks = plan_reads(path, record, part, chosen, limit, checks, mapped=mapped, divided=divided)
            return self._queue(reader, tasks, parameter)

    def submit_whole(self, path: Path, record: TensorRecord, target: torch.Tensor) -> Submission:
        """Queue the load of a whole tensor that is not one of experts, without checksum.

        Other ranks of the host need it too, so it is read through the page cache.

        Args:
            path: the file.
            record: a stored tensor of one byte at least.
            target: ``uint8 [record.nbytes]``, contiguous, on the loader's device.

        Returns:
            What :meth:`wait_for` takes.

        Raises:
            LoadError: as :meth:`submit`.
        """
        with self._called():
            nbytes = record.nbytes
            stored = replace(record, dtype="U8", shape=(1, 1, nbytes))
            part, parameter = ExpertSlice((1, nbytes), 0, nbytes, nbytes, 1), target.view(1, 1, -1)
            check_parameter(stored, part, (0,), parameter, self.device)
            reader = self._files.reader(path, stored, (0,))
            reader.direct = False
            tasks = plan_reads(path, stored, part, (0,), self.options.chunk_nbytes, divided=True)
            return self._queue(reader, tasks, parameter)

    def wait_for(self, submission: Submission) -> NvfpPrepError | None:
        """Wait until one parameter has arrived; :meth:`finish` is still to be called.

        Returns:
            The load's failure so far, after which nothing more arrives.
        """
        return self._accounts.wait_for(submission)

    def _queue(self, reader: FileReader, tasks: Sequence[Task], parameter: torch.Tensor) -> Submission:
        target = flat_bytes(parameter)
        ready = torch.cuda.current_stream(self.device).record_event() if target.is_cuda else None
        views = chunk_views(target, tasks)
        submission = Submission(sum(task.units for task in tasks))
        self._accounts.add(submission, target.numel())
        for task in tasks:
            targets = tuple(views.get(chunk.destination_bytes) if chunk.nbytes else None for chunk in task.chunks)
            if not task.chunks[0].long:
                self._jobs.put(Job(task, reader, targets, ready, submission))
                continue
            begins = pieces(task.chunks[0].segments[0], self.options.chunk_nbytes)
            job = Job(task, reader, targets, ready, submission, iter(begins))
            for _ in range(min(len(begins), self.options.thread_count)):
                self._jobs.put(job)
        return submission

    def _maps(self, reader: FileReader, part: ExpertSlice) -> bool:
        """Return whether short runs are gathered from a mapping: see :class:`Gather`."""
        few = part.run_nbytes * _FEW_COLUMNS <= part.stride_bytes and reader.resident
        wanted = few if self.options.gather is Gather.AUTO else self.options.gather is Gather.MMAP
        return wanted and mapping_supported()

    def finish(self) -> LoadReport:
        """Wait for everything queued and say what it took.

        Raises:
            LoadError, VerificationError: the first failure; all parameters since the last call are void.
            LoadError: if the loader is closed, or another thread is using it.
        """
        with self._called():
            return self._wait()

    def _wait(self) -> LoadReport:
        seconds = self._accounts.wait()
        counts, times = ReadCounts(), Times()
        for reading in self._reading:
            counts.add(reading.counts)
            times.add(reading.times)
            reading.counts, reading.times = ReadCounts(), Times()
        before, self._cpu = self._cpu, self._cpu_seconds()
        times.cpu = self._cpu - before
        error, submitted = self._accounts.close()
        self._files.close()
        if error is not None:
            raise error
        return LoadReport(seconds, submitted, counts, times, len(self._reading))

    def abandon(self) -> None:
        """Drop what is still queued and wait for what is under way; the parameters submitted so far are void.

        Does nothing where another thread is using this loader: its load goes on.
        """
        with contextlib.suppress(NvfpPrepError), self._called():
            self._accounts.abandon("the load was abandoned")
            self._wait()

    def close(self) -> None:
        """Drop what is still queued, end the threads and give staging and files back."""
        if threading.current_thread().name.startswith(_THREADS):
            raise _in_use()  # from its own progress: it would wait for itself
        self._accounts.abandon("the loader was closed")
        with self._call:  # a load that another thread waits for ends at once, because of the error
            if self._closed:
                return
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._files.close()
        self._reading = []  # which hold the staging memory

    def _start_threads(self) -> None:
        started = []
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
        except RuntimeError as error:  # no more threads for this process
            self._threads = started
            self.close()
            raise LoadError(
                f"only {len(started)} of {self.options.thread_count} threads could be started ({error})",
                next_step="Use fewer threads (LoadOptions.threads).",
            ) from error

    def _has_failed(self) -> bool:
        return self._accounts.error is not None

    def _arrived(self, job: Job, nbytes: int) -> None:
        failure = None
        if self._progress is not None and nbytes:
            try:
                self._progress(nbytes)
            except BaseException as error:
                # Raised here it would end a reading thread, and finish() would wait for ever.
                failure = LoadError(f"progress could not be reported ({type(error).__name__}: {error})")
                failure.__cause__ = error
        self._accounts.arrived(job, nbytes, failure)

    def _work(self, reading: Reading) -> None:
        stay_near(self._near)
        while (job := self._jobs.get()) is not None:
            left = job.task.units if job.pieces is None else 0
            if not self._has_failed():
                try:
                    reading.run(job)
                except BaseException as error:
                    # Kept for finish(), which raises it in the caller's thread; the other tasks are dropped.
                    failure = as_load_error(error, job.task)
                    failure.__cause__ = failure.__cause__ or (None if failure is error else error)
                    self._accounts.fail(failure)
                left = reading.left
            if self._has_failed():
                left += job.drop_pieces(self.options.chunk_nbytes)
            if left:
                self._accounts.arrived(job, left)

    def _cpu_seconds(self) -> float:
        """Return the processor time of the reading threads so far; 0 where the system does not say.

        Only while they live: the system call ends the process for a thread that has ended.
        """
        clock_of = getattr(time, "pthread_getcpuclockid", None)
        if clock_of is None:
            return 0.0
        return sum(time.clock_gettime(clock_of(thread.ident)) for thread in self._threads if thread.ident is not None)


def _in_use() -> LoadError:
    return LoadError(
        "the loader is in use by another thread, or called from its own progress",
        next_step="Give every thread a loader of its own, or finish one load before the next.",
    )
