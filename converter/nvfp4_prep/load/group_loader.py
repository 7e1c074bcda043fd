"""An expert loader for code that hands parameters on one by one: what ranks share is kept until all have come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.load.arguments import as_experts
from nvfp4_prep.load.cooperative import CooperativeGroup, CooperativeLoad
from nvfp4_prep.load.loader import ExpertLoader
from nvfp4_prep.load.options import LoadOptions
from nvfp4_prep.load.ranks import Ranks
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.load.shared_parameter import SharedParameter
from nvfp4_prep.load.worker import Submission
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["GroupLoader", "TakesParameters"]


class TakesParameters(Protocol):
    """An :class:`ExpertLoader`, or one that loads with the ranks of a group."""

    @property
    def options(self) -> LoadOptions:
        """Of the loader."""

    @property
    def device(self) -> torch.device:
        """Of the parameters."""

    def submit(
        self,
        path: Path,
        record: TensorRecord,
        part: ExpertSlice,
        experts: Sequence[int],
        parameter: torch.Tensor,
        crc32: Sequence[int] | None = None,
    ) -> object:
        """Queue the load of one parameter; see :meth:`ExpertLoader.submit`."""

    def submit_whole(self, path: Path, record: TensorRecord, target: torch.Tensor) -> Submission:
        """Queue the load of a whole tensor; see :meth:`ExpertLoader.submit_whole`."""

    def wait_for(self, submission: Submission) -> NvfpPrepError | None:
        """Wait for it; see :meth:`ExpertLoader.wait_for`."""

    def finish(self) -> LoadReport:
        """Wait for everything queued; see :meth:`ExpertLoader.finish`."""


class GroupLoader:
    """A loader whose short runs come from the ranks of a group, all others by its own reads.

    Long ranges are read from their :meth:`submit` on. Columns are exchanged in :meth:`finish`, in the order of files
    and places in them, so that every rank makes the same calls whatever the order in which it was asked. Between the
    two nothing is said to the other ranks, and the caller may use the group.

    Attributes:
        answered: whether the other ranks have heard from this one, so that a failure before it must be told.
    """

    def __init__(self, group: CooperativeGroup, waiting: Ranks, loader: ExpertLoader) -> None:
        """Take a loader over.

        Args:
            group: of the ranks that submit the same parameters, each its own columns.
            waiting: the same ranks on the CPU: where the first waits for the last, and hears of failures.
            loader: of this rank; closed by its owner.
        """
        self._loader, self._waiting = loader, waiting
        self._together = CooperativeLoad(group, loader)
        self._shared: list[SharedParameter] = []
        self.answered = False

    @property
    def options(self) -> LoadOptions:
        """Of the loader."""
        return self._loader.options

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self._loader.device

    @property
    def exchanged(self) -> int:
        """Number of the parameters submitted so far that the ranks exchange."""
        return len(self._shared)

    def submit(
        self,
        path: Path,
        record: TensorRecord,
        part: ExpertSlice,
        experts: Sequence[int],
        parameter: torch.Tensor,
        crc32: Sequence[int] | None = None,
    ) -> None:
        """Queue the load of one parameter, or keep it for the exchange; see :meth:`ExpertLoader.submit`."""
        item = SharedParameter(path, record, part, as_experts(experts), parameter, crc32)
        if item.is_exchanged(self._waiting.size):
            self._shared.append(item)
        else:
            item.submit(self._loader)

    def submit_whole(self, path: Path, record: TensorRecord, target: torch.Tensor) -> Submission:
        """Queue the load of a whole tensor, which every rank reads; see :meth:`ExpertLoader.submit_whole`."""
        return self._loader.submit_whole(path, record, target)

    def wait_for(self, submission: Submission) -> NvfpPrepError | None:
        """Wait for a whole tensor; see :meth:`ExpertLoader.wait_for`."""
        return self._loader.wait_for(submission)

    def finish(self) -> LoadReport:
        """Wait for the other ranks, exchange, and wait for everything queued.

        Raises:
            LoadError: with the first failed rank's error, or if a rank is missing; on every rank.
            UsageError: if the ranks were asked for different things.
        """
        try:
            self.answered = True
            self._waiting.agree(None)
            with self._together.preparing():
                self._together.begin(sorted(self._shared, key=lambda item: (item.path, item.record.offset_bytes)), ())
            return self._together.complete()
        except BaseException:
            self._loader.abandon()
            raise
