"""Memory for results: by default torch's own, or a caller's pool of buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["Empty", "new_empty"]

Empty = Callable[[Sequence[int], torch.Tensor], torch.Tensor]
"""Takes a shape and a tensor; returns uninitialized contiguous memory of that shape, with the tensor's dtype and
device, at an address that 8 divides."""


def new_empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Return memory of torch's own allocator; see :data:`Empty`."""
    return like.new_empty(tuple(shape))
