"""Reading ahead: a few threads read the next experts while the ones before are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from nvfp4_prep._util.limits import usable_cores

__all__ = ["ReadAhead", "Sequential"]

_THREADS = 4
"""Enough for a GPU, which computes an expert in the time in which one thread reads half of it from memory."""

T = TypeVar("T")


class ReadAhead:
    """A few threads; use as a context manager, which ends with what they are at. Where none may be started, the one
    that asks does the work.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self.threads = min(_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="smoke-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, make: Callable[[int], T], position: int) -> Future[T]:
        """Have ``make(position)`` called."""
        try:
            return self._pool.submit(make, position)
        except RuntimeError:  # the system allows no more threads
            done: Future[T] = Future()
            try:
                done.set_result(make(position))
            except Exception as error:
                done.set_exception(error)
            return done

    def for_each(self, work: Callable[[int], None], positions: Iterable[int]) -> None:
        """Call ``work`` with every position, on all threads; raise what one of the calls raised."""
        for done in [self.submit(work, position) for position in positions]:
            done.result()


class Sequential(Generic[T]):
    """Values that are asked for one after another: the next ones are made meanwhile.

    Memory: as many values as there are threads, and the one that was asked for.
    """

    def __init__(self, ahead: ReadAhead, make: Callable[[int], T], count: int) -> None:
        """Begin with nothing.

        Args:
            ahead: its threads.
            make: makes the value of a position below ``count``.
            count: how many there are.
        """
        self._ahead, self._make, self._count = ahead, make, count
        self._made: dict[int, Future[T]] = {}

    def __call__(self, position: int) -> T:
        """Return the value of a position; raise what making it raised."""
        last = min(self._count, position + 1 + self._ahead.threads)
        # what lies behind, or too far ahead after a step back, would be held for nothing
        self._made = {at: made for at, made in self._made.items() if position <= at < last}
        for at in range(position, last):
            if at not in self._made:
                self._made[at] = self._ahead.submit(self._make, at)
        return self._made.pop(position).result()
