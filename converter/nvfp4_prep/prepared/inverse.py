"""Inversion of prepared bytes: back to the source's matrices, and to the arrangement of its tensors."""

from __future__ import annotations

import torch

from nvfp4_prep._util.buffers import contiguous, empty_like_pooled
from nvfp4_prep.errors import CheckpointError
from nvfp4_prep.moe.layers import SOURCE_BLOCK_SCALE, TensorGroup
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep_kernels import PreparedTensor, Projection

__all__ = ["original_block_scales", "source_bytes", "source_parts", "with_original_scales"]


def original_block_scales(
    checkpoint: PreparedCheckpoint, layer: LayerRecord, expert: int
) -> tuple[Projection, torch.Tensor] | None:
    """Return the rescaled projection of an expert and its source block scales ``uint8 [I, H/16]``; ``None`` for none.

    Raises:
        CheckpointError: if the stored tensor has another shape than the manifest says.
    """
    found = [(row, side) for row, (number, side) in enumerate(layer.gate_up.reconciled) if number == expert]
    if not found:
        return None
    position, side = found[0]
    record = checkpoint.record(layer.prepared_name(SOURCE_BLOCK_SCALE))
    shape = layer.layout.source_shape(PreparedTensor.W13_WEIGHT_SCALE, layer.dims)
    if record.shape != (len(layer.gate_up.reconciled), *shape):
        raise CheckpointError(f"tensor {record.name!r} has the wrong shape", where=str(checkpoint.path / record.file))
    nbytes = shape[0] * shape[1]
    return Projection(side), checkpoint.read(record, position * nbytes, nbytes).view(shape)


def source_parts(
    checkpoint: PreparedCheckpoint, layer: LayerRecord, tensor: PreparedTensor, chunk: range, prepared: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the source matrices of some experts: one ``uint8 [n, rows, bytes per row]`` for each projection.

    Raises:
        ValueError: if a padding byte is not zero.
    """
    parts = layer.layout.invert(tensor, prepared, layer.dims, empty_like_pooled)
    return with_original_scales(checkpoint, layer, tensor, chunk, parts)


def with_original_scales(
    checkpoint: PreparedCheckpoint,
    layer: LayerRecord,
    tensor: PreparedTensor,
    chunk: range,
    parts: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Return inverted parts with the source's block scales in place of those that were rescaled."""
    if tensor is not PreparedTensor.W13_WEIGHT_SCALE or not layer.gate_up.reconciled:
        return parts
    restored = {
        projection: part.clone() for projection, part in zip(layer.layout.projections(tensor), parts, strict=True)
    }
    for row, expert in enumerate(chunk):
        original = original_block_scales(checkpoint, layer, expert)
        if original is not None:
            restored[original[0]][row] = original[1]
    return tuple(restored.values())


def source_bytes(
    layer: LayerRecord, tensor: PreparedTensor, parts: tuple[torch.Tensor, ...]
) -> list[tuple[TensorGroup, torch.Tensor]]:
    """Arrange matrices as the source does: for each group of tensors ``uint8 [n, nbytes of one expert]``."""
    by_projection = dict(zip(layer.layout.projections(tensor), parts, strict=True))
    found = []
    for group in layer.groups_for(tensor):
        mine = [by_projection[projection] for projection in group.projections]
        if len(mine) == 1 and not group.transposed:
            raw = contiguous(mine[0]).view(mine[0].shape[0], -1)
        else:
            raw = torch.stack([group.disarrange(matrices) for matrices in zip(*mine, strict=True)])
        found.append((group, raw))
    return found
