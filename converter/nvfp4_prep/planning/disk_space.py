"""Disk space of a run: one sum for the plan's figure, the check before the first byte, and the outlook."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.output.sink import FileSink

if TYPE_CHECKING:  # it imports torch, and rendering needs the figures alone
    from nvfp4_prep.planning.plan import Plan

__all__ = ["SMALL_FILES_NBYTES", "Room", "room_for"]

SMALL_FILES_NBYTES = 64_000_000
"""Kept for index, configs, card and manifest, whose sizes are not known beforehand."""


@dataclass(frozen=True)
class Room:
    """Disk room that a run takes at most.

    Attributes:
        output_nbytes: for files of tensors and copied files.
        download_nbytes: for the source's shards that are there at once.
    """

    output_nbytes: int
    download_nbytes: int = 0

    @property
    def needed_nbytes(self) -> int:
        """All of it, with the small files of the end."""
        return self.output_nbytes + self.download_nbytes + SMALL_FILES_NBYTES


def room_for(plan: Plan, done: Collection[str], source: Source, sink: FileSink) -> Room:
    """Return the room for the files of a plan, or of a part of it, that are not ``done``."""
    pending = [file for file in plan.files if file.name not in done]
    sizes = {file.name: file.nbytes for file in pending}
    sizes |= {file.name: file.nbytes for file in plan.side_files if file.name not in done}
    order = plan.shard_order(file for file in pending if file.kind is not FileKind.EXPERT_SCALES)
    return Room(sink.room_nbytes(sizes), source.room_nbytes(order, plan.peak_shards_nbytes))
