"""Bringing loaded parameters into the layout of the backend that was asked for, on their device."""

from __future__ import annotations

import logging
from typing import Any

from nvfp4_prep.sglang.layer_weights import big_tensors
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.tile_relayout import relayout_tiles

__all__ = ["bring_into"]

logger = logging.getLogger(__name__)
_told: set[tuple[MoeLayout, MoeLayout]] = set()


def bring_into(layer: Any, stored: MoeLayout, wanted: MoeLayout) -> None:
    """Convert a layer's four big parameters in place; one matrix of extra memory."""
    if stored == wanted:
        return
    if (stored, wanted) not in _told:
        _told.add((stored, wanted))
        logger.warning(
            "Prepared experts are permuted while loading: the file is in another layout than the chosen MoE runner"
            " backend reads. Leave --moe-runner-backend out, or run `nvfp4-prep relayout` once and for all."
        )
    for tensor, data in big_tensors(layer):
        relayout_tiles(tensor, data, stored, wanted, out=data)
