"""Worker threads of the engine, joined in a way that a second Ctrl-C cannot break."""

from __future__ import annotations

import threading
from collections.abc import Callable

from nvfp4_prep._util.limits import usable_cores, usable_memory_nbytes
from nvfp4_prep._util.system import start_thread

__all__ = ["WorkerThreads", "default_memory_nbytes", "default_threads"]

_MIN_MEMORY_NBYTES = 640 * 2**20
_WORKER_MEMORY_NBYTES = 128 * 2**20
_MAX_THREADS = 64


def default_threads() -> int:
    """Return one worker more than the usable cores, because units wait for the disk; at most 64."""
    return min(_MAX_THREADS, usable_cores() + 1)


def default_memory_nbytes(threads: int | None = None) -> int:
    """Return the memory budget of buffers: 128 MiB a worker (two units of 16 MiB), at least 640 MiB, but never more
    than half of the usable memory: the rest is for torch, the plan and the page cache.
    """
    wanted = max(_MIN_MEMORY_NBYTES, _WORKER_MEMORY_NBYTES * (threads or default_threads()))
    return min(wanted, usable_memory_nbytes() // 2)


class WorkerThreads:
    """Threads that are waited for by events of our own.

    ``Thread.join`` that an interrupt breaks off takes a running thread for a stopped one (CPython issue 90882): files
    would be closed under a worker that still writes.
    """

    def __init__(self, work: Callable[[], None], count: int) -> None:
        self._work = work
        self._ended = [threading.Event() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(ended,), name=f"nvfp4-prep-{number}")
            for number, ended in enumerate(self._ended)
        ]

    def _run(self, ended: threading.Event) -> None:
        try:
            self._work()
        finally:
            ended.set()

    def start(self) -> None:
        """Start them all.

        Raises:
            NvfpPrepError: if this process may have no more threads; those that were started must still be waited for.
        """
        for started, thread in enumerate(self._threads):
            start_thread(thread, f"{started} of {len(self._threads)} run", ", or give fewer --threads")

    def wait(self) -> None:
        """Wait until all that were started have ended."""
        for thread, ended in zip(self._threads, self._ended, strict=True):
            while thread.ident is not None and not ended.wait(0.1):
                pass

    def wait_through_interrupts(self) -> None:
        """Wait as :meth:`wait` does, and ignore further Ctrl-C: each worker finishes its current unit."""
        while True:
            try:
                self.wait()
                return
            except KeyboardInterrupt:
                continue
