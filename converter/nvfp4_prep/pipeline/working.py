"""Surroundings of every command that runs the engine: its progress, and one thread for torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nvfp4_prep._util.progress import Progress
from nvfp4_prep._util.steps import step
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep._util.torch_threads import one_torch_thread

__all__ = ["working"]


@contextmanager
def working(progress: Progress, title: str, total_nbytes: int, done_nbytes: int = 0) -> Iterator[None]:
    """Start and close the progress, and keep torch to one thread meanwhile: the engine's workers run in parallel.

    Args:
        progress: told of the start and of the end, however it comes.
        title, total_nbytes, done_nbytes: see :meth:`Progress.start`.
    """
    with step(f"{title} ({format_nbytes(total_nbytes)})"), one_torch_thread():
        progress.start(title, total_nbytes, done_nbytes)
        try:
            yield
        finally:
            progress.close()
