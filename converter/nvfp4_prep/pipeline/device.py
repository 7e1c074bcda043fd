"""The device that makes prepared bytes: the CPU by the torch reference, or a GPU by the Triton kernels.

The bytes are the same. Whatever made them, the CPU inverts them before they are written, so a GPU's
result is checked by other code on other hardware.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch

from nvfp4_prep._util.arguments import DEVICES
from nvfp4_prep._util.buffers import contiguous, empty_like_pooled
from nvfp4_prep.errors import UsageError
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor

__all__ = ["apply_layout", "choose_device"]


def choose_device(name: str) -> torch.device:
    """Return the device by the name that the command line uses.

    Raises:
        UsageError: if it cannot be used here, before any work.
    """
    if name not in DEVICES:
        raise UsageError("no such device", expected=" or ".join(DEVICES), actual=name)
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA GPU here", next_step="Leave --device out: the CPU makes the same bytes.")
    if name == "cuda" and importlib.util.find_spec("triton") is None:
        raise UsageError("--device cuda needs Triton", next_step="Run: pip install triton")
    return torch.device(name)


def apply_layout(
    layout: MoeLayout, tensor: PreparedTensor, dims: MoeDims, parts: Sequence[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Prepare some experts.

    Args:
        layout, tensor: what to make.
        dims: of the layer; the number of experts comes from the parts.
        parts: one ``uint8 [n, rows, bytes per row]`` on the CPU for each of ``layout.projections(tensor)``.
        device: where. A GPU needs room for twice the parts.

    Returns:
        ``uint8 [n, rows, bytes per row]`` on the CPU, contiguous.
    """
    if device.type == "cpu":
        return contiguous(layout.apply(tensor, *parts, empty=empty_like_pooled))
    from nvfp4_prep_kernels.triton_prepare import prepare

    there = [part.contiguous().to(device) for part in parts]
    return prepare(layout, tensor, replace(dims, experts=len(parts[0])), *there).cpu()
