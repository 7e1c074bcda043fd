"""A rank's share without the padding of H, for servers whose kernels take H as it is."""

from __future__ import annotations

from dataclasses import replace

from nvfp4_prep_kernels import ExpertSlice, LayoutError, PreparedTensor
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE

__all__ = ["can_drop_hidden_padding", "drop_hidden_padding"]


def can_drop_hidden_padding(hidden: int) -> bool:
    """Return whether the padding of H lies in tiles of its own: H is the rows of w2, and rows move inside tiles."""
    return hidden % ROW_TILE == 0


def drop_hidden_padding(part: ExpertSlice, tensor: PreparedTensor, padded: int, hidden: int) -> ExpertSlice:
    """Return the share of one expert without the padding of H.

    Args:
        part: the share with it.
        padded, hidden: H as stored, and as the model has it.

    H is the columns of w13, where every row (every row of scale tiles) is cut, and the rows of w2.

    Raises:
        LayoutError: if the padding shares tiles with the rest, or lies in a layout of several runs.
    """
    if padded == hidden:
        return part
    if not can_drop_hidden_padding(hidden):
        raise LayoutError(f"hidden size {hidden}: its padding to {padded} is not in tiles of its own")
    rows, row_nbytes = part.shape
    if not tensor.is_w13:
        kept = (hidden, row_nbytes)
        if part.runs == 1:
            return replace(part, shape=kept, run_nbytes=part.run_nbytes * hidden // padded)
        return replace(part, shape=kept, runs=part.runs * hidden // padded)
    if part.runs != 1:
        raise LayoutError("w13 in several runs is not padded along H")
    line = row_nbytes * (ROW_TILE if tensor.is_scale else 1)
    return ExpertSlice(
        shape=(rows, row_nbytes * hidden // padded),
        offset_bytes=part.offset_bytes,
        run_nbytes=line * hidden // padded,
        stride_bytes=line,
        runs=part.nbytes // line,
    )
