"""Filled staging buffers to the GPU: one thread hands copies to the driver, one takes finished buffers back.

Every call into torch or the driver gives Python's interpreter lock away, and getting it back costs about 25 µs while
sixteen reading threads want it too. When each reading thread copied for itself, eight such calls a chunk took 0.24 ms
whatever the chunk's size, and loading stopped at 16 to 23 GB/s on an H200. So the readers only read, and whatever
has been filled meanwhile is handed on in one call.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from nvfp4_prep.load.strided_copy import run_views
from nvfp4_prep.load.worker import Buffers, Filled

__all__ = ["Transfer"]


_SLICING_NBYTES = 64 * 1024 * 1024
"""Device memory in which whole rows wait to be sliced."""


class Transfer:
    """Copies to one device on a stream of its own.

    Device memory, from the first chunk of whole rows on: 64 MiB or one buffer, the staging's size at most.
    """

    def __init__(
        self,
        device: torch.device,
        buffers: Buffers,
        done: Callable[[Sequence[Filled]], None],
        failed: Callable[[BaseException, Filled], None],
    ) -> None:
        """Start both threads.

        Args:
            device: CUDA device.
            buffers: where finished buffers go back to.
            done: told what has arrived.
            failed: told an error of the driver, before the buffers concerned are reported as done.
        """
        self.submit_s = 0.0
        self._device = device
        self._buffers = buffers
        self._done = done
        self._failed = failed
        self._rows: list[torch.Tensor] = []  # on the device; the stream's order says when one is free again
        self._events: list[torch.cuda.Event] = []  # done with, to be used again
        self._filled: queue.SimpleQueue[Filled | None] = queue.SimpleQueue()
        self._copying: queue.SimpleQueue[tuple[torch.cuda.Event, Sequence[Filled]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=run, name=f"nvfp4-load-{name}", daemon=True)
            for name, run in (("submit", self._submit_all), ("release", self._release_all))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, filled: Filled) -> None:
        """Take over a filled buffer."""
        self._filled.put(filled)

    def close(self) -> None:
        """End both threads after everything taken over."""
        self._filled.put(None)
        for thread in self._threads:
            thread.join()

    def _submit_all(self) -> None:
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream(self._device)
        torch.cuda.set_stream(stream)
        last: torch.cuda.Event | None = None
        while True:
            batch = self._next_batch()
            if not batch:
                self._copying.put(None)
                return
            begun = time.perf_counter()
            # A thread that waits must not take a core from those that read: a blocking event.
            event = self._events.pop() if self._events else torch.cuda.Event(blocking=True)
            try:
                for item in batch:
                    if item.job.ready is not None and item.job.ready is not last:
                        stream.wait_event(item.job.ready)
                        last = item.job.ready
                self._copy(batch)
                event.record(stream)
            except Exception as error:
                self._failed(error, batch[0])
            self._copying.put((event, batch))
            self.submit_s += time.perf_counter() - begun

    def _next_batch(self) -> list[Filled]:
        """Wait for one buffer and take all others that are filled by then; empty at the end."""
        batch: list[Filled] = []
        item = self._filled.get()
        while item is not None:
            batch.append(item)
            try:
                item = self._filled.get_nowait()
            except queue.Empty:
                return batch
        if batch:
            self._filled.put(None)
        return batch

    def _copy(self, batch: Sequence[Filled]) -> None:
        sources, targets = [], []
        slices: list[Filled] = []
        for item in batch:
            if item.target is None:
                continue
            if item.cut is not None:
                slices.append(item)
                continue
            source = self._buffers.chunks[item.buffer]
            if item.lead or item.nbytes != self._buffers.chunk_nbytes:
                source = self._buffers.bytes[item.buffer][item.lead : item.lead + item.nbytes]
            sources.append(source)
            targets.append(item.target)
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        if slices:
            self._make_rows()
        for first in range(0, len(slices), max(1, len(self._rows))):
            self._copy_slices(slices[first : first + len(self._rows)])

    def _copy_slices(self, batch: Sequence[Filled]) -> None:
        """Copy whole rows and slice them on the device; no more at once than there is memory for."""
        staged, rows, runs, targets = [], [], [], []
        for place, item in zip(self._rows, batch, strict=False):
            if item.cut is None or item.target is None:
                continue
            cut, end = item.cut, item.lead + item.cut.span_nbytes
            staged.append(self._buffers.bytes[item.buffer][item.lead : end])
            rows.append(place[item.lead : end])
            source, target = run_views(place, item.lead, cut.run_nbytes, cut.stride_bytes, cut.runs, item.target)
            runs.append(source)
            targets.append(target)
        torch._foreach_copy_(rows, staged, non_blocking=True)
        torch._foreach_copy_(targets, runs)

    def _make_rows(self) -> None:
        if not self._rows:
            nbytes = len(self._buffers.bytes[0])
            count = max(1, min(len(self._buffers.bytes), _SLICING_NBYTES // nbytes))
            self._rows = list(torch.empty((count, nbytes), dtype=torch.uint8, device=self._device))

    def _release_all(self) -> None:
        torch.cuda.set_device(self._device)
        while (copying := self._copying.get()) is not None:
            event, batch = copying
            try:
                event.synchronize()
            except Exception as error:
                self._failed(error, batch[0])
            self._events.append(event)
            for item in batch:
                self._buffers.give_back(item.buffer)
            self._done(batch)
