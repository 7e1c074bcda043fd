"""Source bytes of some experts, read and arranged into canonical matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nvfp4_prep._util.buffers import byte_view, empty_bytes
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.moe.layers import TensorGroup
from nvfp4_prep_kernels import Projection

__all__ = ["arrange_experts", "arrange_groups", "read_experts"]


def read_experts(source: Source, group: TensorGroup, chunk: range, experts: int) -> torch.Tensor:
    """Return the source bytes of some experts of one group: ``uint8 [len(chunk), nbytes of one expert]``."""
    nbytes = group.expert_range(chunk.start, experts).nbytes
    raw = empty_bytes(len(chunk) * nbytes)
    view = byte_view(raw)
    for row, expert in enumerate(chunk):
        byte_range = group.expert_range(expert, experts)
        source.read_into(byte_range.file, byte_range.offset_bytes, view[row * nbytes : (row + 1) * nbytes])
    return raw.view(len(chunk), nbytes)


def arrange_experts(group: TensorGroup, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Do :meth:`TensorGroup.arrange` for several experts: ``uint8 [n, rows, bytes per row]`` for each projection."""
    if len(group.projections) == 1 and not group.transposed:
        return (raw.view(raw.shape[0], *group.shape[-2:]),)
    arranged = [group.arrange(row) for row in raw]
    return tuple(torch.stack(parts) for parts in zip(*arranged, strict=True))


def arrange_groups(
    groups: Sequence[TensorGroup], raws: Sequence[torch.Tensor], projections: Sequence[Projection]
) -> list[torch.Tensor]:
    """Do :func:`arrange_experts` for groups that together hold ``projections``, in that order whatever theirs is."""
    found = {
        projection: part
        for group, raw in zip(groups, raws, strict=True)
        for projection, part in zip(group.projections, arrange_experts(group, raw), strict=True)
    }
    return [found[projection] for projection in projections]
