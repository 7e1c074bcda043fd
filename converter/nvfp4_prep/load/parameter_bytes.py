"""A parameter's bytes, whole and by chunks, with few calls of torch: each waits for the GIL, as reading threads do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nvfp4_prep.load.read_plan import Task

__all__ = ["chunk_views", "flat_bytes"]


def flat_bytes(parameter: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a parameter by as few calls of torch as it takes: the reading threads want the GIL, too."""
    data = parameter.detach() if parameter.requires_grad else parameter
    data = data if data.dtype == torch.uint8 else data.view(torch.uint8)
    return data if data.dim() == 1 else data.view(-1)


def chunk_views(target: torch.Tensor, tasks: Sequence[Task]) -> dict[int, torch.Tensor]:
    """Return each chunk's part by its offset: one call for all, instead of one in the way of the reading threads."""
    chunks = sorted((chunk.destination_bytes, chunk.nbytes) for task in tasks for chunk in task.chunks if chunk.nbytes)
    if len(chunks) == 1:
        return {chunks[0][0]: target}
    parts = target.split([nbytes for _, nbytes in chunks])
    return {offset: part for (offset, _), part in zip(chunks, parts, strict=True)}
