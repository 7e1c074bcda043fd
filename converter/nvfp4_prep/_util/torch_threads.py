"""torch on one thread, where the parallelism is elsewhere, or OpenMP's spinning threads cost more than they win."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["one_torch_thread"]


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread meanwhile. On busy cores its threads, which spin, cost ten times what they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
