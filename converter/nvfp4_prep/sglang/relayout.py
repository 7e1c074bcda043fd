"""Bringing loaded parameters into the layout of the backend that was asked for, on their device."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from nvfp4_prep.serving.placement import Placement
from nvfp4_prep.serving.relayout_at_load import RelayoutAtLoad
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE

__all__ = ["bring_into", "relayout_of"]

logger = logging.getLogger(__name__)
_told: set[tuple[MoeLayout, MoeLayout]] = set()


def relayout_of(placement: Placement, wanted: MoeLayout) -> RelayoutAtLoad | None:
    """Return the conversion of a rank's share as it was loaded; ``None`` if the file has the wanted layout.

    Raises:
        ServingError: if the two layouts hold these sizes differently.
    """
    if placement.layout == wanted:
        return None
    # The padding of H was left out while loading.
    stored, asked = (replace(layout, hidden_alignment=ROW_TILE) for layout in (placement.layout, wanted))
    relayout = RelayoutAtLoad.of_share(stored, asked, placement.dims, placement.tp_size)
    relayout.check(placement.layer_name, "--moe-runner-backend")
    return relayout


def bring_into(layer: Any, relayout: RelayoutAtLoad | None) -> None:
    """Convert a layer's four big parameters in place; see :mod:`nvfp4_prep.serving.relayout_at_load` for the memory."""
    if relayout is None:
        return
    if (relayout.source, relayout.target) not in _told:
        _told.add((relayout.source, relayout.target))
        logger.warning(
            "Prepared experts are permuted while loading: the file is in another layout than the chosen MoE runner"
            " backend reads. Leave --moe-runner-backend out, or run `nvfp4-prep relayout` once and for all."
        )
    relayout.convert(layer)
