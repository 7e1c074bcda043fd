"""What the engine's worker threads share: an order to keep, a budget of memory, and an end that nobody misses."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["MEMORY_BUDGET_NBYTES", "Budget", "Crew", "Stopped", "Turnstile"]

MEMORY_BUDGET_NBYTES = 640 * 2**20
"""Limit of a run's :class:`Budget`: the memory of its buffers, whatever the checkpoint's size."""


class Stopped(Exception):
    """Another worker failed: this one has nothing to wait for any more."""


class Turnstile:
    """Lets numbers 0, 1, 2, … through one after the other."""

    def __init__(self, stop: threading.Event) -> None:
        self._next = 0
        self._stop = stop
        self._condition = threading.Condition()

    def wait(self, number: int) -> None:
        """Until it is the number's turn; raises :class:`Stopped` if the run ends before."""
        with self._condition:
            while self._next != number:
                if self._stop.is_set():
                    raise Stopped
                self._condition.wait(0.2)

    def leave(self) -> None:
        """The next number's turn."""
        with self._condition:
            self._next += 1
            self._condition.notify_all()


class Budget:
    """Bytes that units in work may hold together; one unit may always start."""

    def __init__(self, nbytes: int, stop: threading.Event) -> None:
        self._limit = nbytes
        self._held = 0
        self._stop = stop
        self._condition = threading.Condition()

    def take(self, nbytes: int) -> None:
        """Waits until so many bytes fit; raises :class:`Stopped` if the run ends before."""
        with self._condition:
            while self._held and self._held + nbytes > self._limit:
                if self._stop.is_set():
                    raise Stopped
                self._condition.wait(0.2)
            self._held += nbytes

    def give(self, nbytes: int) -> None:
        """Gives back what :meth:`take` took."""
        with self._condition:
            self._held -= nbytes
            self._condition.notify_all()


class Crew:
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
        """Starts them all."""
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all that were started have ended."""
        for thread, ended in zip(self._threads, self._ended, strict=True):
            while thread.ident is not None and not ended.wait(0.1):
                pass

    def wait_through_interrupts(self) -> None:
        """The same, whatever a second Ctrl-C wants: workers end with the unit that they have in hand."""
        while True:
            try:
                self.wait()
                return
            except KeyboardInterrupt:
                continue
