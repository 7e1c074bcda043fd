"""Pauses of Python's cycle collector, while many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Look for no cycles meanwhile: hundreds of thousands of records are gone through again and again, for nothing.

    Halves the time to plan 276,480 tensors. Several threads may pause at once: the first that ends its pause ends it
    for the others too, which are slower then and otherwise the same. Also a decorator.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
