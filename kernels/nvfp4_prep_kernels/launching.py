"""The device of a Triton launch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["on_device"]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches there, not where the tensors are. Its interpreter has none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
