"""The views of staging memory that one round of a cooperative load reads into, sends from and receives in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nvfp4_prep.load.shared_parameter import SharedParameter

__all__ = ["RoundViews"]


@dataclass(frozen=True)
class RoundViews:
    """Views of staging memory for one round. Made once for all rounds of a kind: every call of torch waits for the GIL.

    Attributes:
        experts: that this rank reads, ``uint8 [E, *shape]``.
        columns: the same, one panel of columns a rank, ``[size, E, runs, run]``.
        panels: where these go, in the same shape; the bytes of ``sent``.
        sent: flat ``uint8``.
        outgoing, incoming: bytes for each rank, and from each.
    """

    experts: torch.Tensor
    columns: torch.Tensor
    panels: torch.Tensor
    sent: torch.Tensor
    outgoing: list[int]
    incoming: list[int]

    @classmethod
    def of(
        cls,
        stage: torch.Tensor,
        sent: torch.Tensor,
        item: SharedParameter,
        counts: Sequence[int],
        rank: int,
    ) -> RoundViews:
        """Take the views of a round in which each rank reads so many experts."""
        unit, size, width = item.part.nbytes, len(counts), item.part.run_nbytes
        mine = counts[rank] * item.whole.nbytes
        read, sent = stage[:mine], sent[:mine]
        wide, panels = read, sent
        if width % 8 == 0:
            wide, panels, width = read.view(torch.int64), sent.view(torch.int64), width // 8
        return cls(
            experts=read.view(-1, *item.whole.shape),
            columns=wide.view(-1, item.part.runs, size, width).permute(2, 0, 1, 3),
            panels=panels.view(size, -1, item.part.runs, width),
            sent=sent,
            outgoing=[counts[rank] * unit] * size,
            incoming=[count * unit for count in counts],
        )
