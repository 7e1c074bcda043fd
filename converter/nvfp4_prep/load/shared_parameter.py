"""A parameter that all tensor-parallel ranks of a host have columns of, and whether they had better exchange it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.errors import UsageError
from nvfp4_prep.load.loader import ExpertLoader
from nvfp4_prep.load.read_plan import DIRECT_NBYTES, LONG_RUN_NBYTES
from nvfp4_prep.load.storage import is_network_storage
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["SharedParameter"]


@dataclass(frozen=True)
class SharedParameter:
    """A parameter that every rank has columns of.

    Attributes:
        path, record: the stored tensor.
        part: this rank's.
        experts: the stored expert of each slot; the same on all ranks.
        parameter: of this rank, ``[slots, *part.shape]``.
        crc32: the manifest's checksums.
    """

    path: Path
    record: TensorRecord
    part: ExpertSlice
    experts: tuple[int, ...]
    parameter: torch.Tensor
    crc32: Sequence[int] | None

    @property
    def in_order(self) -> bool:
        """Return whether the slots follow the stored experts, so that what is received is in its place at once."""
        return all(one < other for one, other in pairwise(self.experts))

    @property
    def whole(self) -> ExpertSlice:
        """Return all stored bytes of an expert; a file that is padded for some ranks has no slice for one."""
        stored = self.record.nbytes // self.record.shape[0]
        return ExpertSlice((self.part.shape[0], stored // self.part.shape[0]), 0, stored, stored, 1)

    def submit(self, loader: ExpertLoader, slots: slice = slice(None)) -> None:
        """Queue this rank's share of some slots, read by itself."""
        target = self.parameter[slots]
        loader.submit(self.path, self.record, self.part, self.experts[slots], target, self.crc32)

    def is_exchanged(self, size: int) -> bool:
        """Return whether ``size`` ranks had better exchange this than each read its part: the same on all of one host.

        On local storage that is many runs of less than a disk's request, and on network storage whatever is shorter
        than a request that is worth its time there.
        """
        if not self._panels(size):
            return False
        if _on_network(self.path):
            return self.part.run_nbytes < DIRECT_NBYTES
        return self.part.runs > 1 and self.part.run_nbytes < LONG_RUN_NBYTES

    def check_panels(self, rank: int, size: int) -> None:
        """Raise :class:`UsageError` unless the rank's runs are one of ``size`` equal panels of all lines."""
        if self.part.offset_bytes != rank * self.part.run_nbytes or not self._panels(size):
            raise UsageError(
                f"not the share of tensor-parallel rank {rank} of {size}, which this rank is in its group",
                where=f"{self.path}, tensor {self.record.name!r}",
                next_step="Give the process group of the tensor-parallel ranks.",
            )

    def _panels(self, size: int) -> bool:
        line = self.part.stride_bytes if self.part.runs > 1 else self.whole.nbytes
        return line == size * self.part.run_nbytes and self.part.runs * line == self.whole.nbytes


def _on_network(path: Path) -> bool:
    try:
        return is_network_storage(path.stat().st_dev)
    except OSError:
        return False  # said with the right words when it is opened
