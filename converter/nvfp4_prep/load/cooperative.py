"""Cooperative load: the tensor-parallel ranks of one host read every byte of w2 once and exchange their columns.

A rank's columns of w2 are short pieces of every row. So each rank reads whole experts, one share of them, in long
ranges into device memory, slices them there into one panel of columns a rank, and an all-to-all brings every rank its
own. This goes in rounds of bounded size: while one is exchanged, the next one is read. w13 is read as without a group,
a piece between two rounds, so that the reading threads always have something to do. On network storage, where a request
costs as much as a megabyte, rows of w13 and its scales that are shorter than that are exchanged too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.errors import LoadError, NvfpPrepError, UsageError
from nvfp4_prep.load.exchange_plan import Round, plan_rounds
from nvfp4_prep.load.loader import ExpertLoader, flat_bytes
from nvfp4_prep.load.ranks import Ranks
from nvfp4_prep.load.read_plan import DIRECT_NBYTES, LONG_RUN_NBYTES
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.load.storage import is_network_storage
from nvfp4_prep.load.worker import Submission
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["CooperativeGroup", "CooperativeLoad", "SharedParameter"]

_BUFFERS = 3
"""Two that are read into, one to send from; one more to receive into where slots do not follow the stored experts."""
_ROUNDS_A_QUESTION = 8
"""Rounds after which the ranks ask each other for failures: a question takes the time of an exchange."""


@dataclass(frozen=True)
class CooperativeGroup:
    """The tensor-parallel ranks of one host, and what they may use.

    Attributes:
        group: rank ``i`` of it is tensor-parallel rank ``i``. With a backend for the device of the load: NCCL for a
            GPU, gloo for the CPU. Nobody else may use it while it loads.
        exchange_nbytes: device memory for the exchange; four experts of w2 (29 MB at Kimi-K2.5's sizes) if it is less.
        timeout: for the slowest rank to come to a call. A rank that does not is named in the others' error.
    """

    group: dist.ProcessGroup
    exchange_nbytes: int = 256 * 1024 * 1024
    timeout: timedelta = timedelta(minutes=10)

    def on(self, device: torch.device) -> Ranks:
        """Return the ranks, for exchanges of a device's memory."""
        return Ranks(self.group, device, self.timeout)


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


class CooperativeLoad:
    """One load of the ranks of a group: :meth:`begin` inside :meth:`preparing` on each, then :meth:`complete`.

    Device memory: ``exchange_nbytes`` of the group, until the end of :meth:`finish`.
    """

    def __init__(self, group: CooperativeGroup, loader: ExpertLoader) -> None:
        """Allocate nothing yet."""
        self._loader = loader
        self._limit = group.exchange_nbytes
        self._ranks = group.on(loader.device)
        self._stream = torch.cuda.Stream(loader.device) if loader.device.type == "cuda" else None
        self._rounds: list[tuple[SharedParameter, torch.Tensor, Round]] = []
        self._views: dict[tuple[ExpertSlice, tuple[int, ...], int], _Views] = {}
        self._end: Callable[[], bool] | None = None
        self._own: Sequence[SharedParameter] = ()
        self._fed = 0
        self._reading: deque[Submission | None] = deque()
        self._stages: list[torch.Tensor] = []
        self._error: NvfpPrepError | None = None
        self._digest = hashlib.sha256(f"{group.exchange_nbytes} {loader.options.verify}".encode())

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._ranks.size

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Return a context in which a rank may fail alone; at its end all fail together, or have the same to load."""
        error: Exception | None = None
        try:
            yield
        except Exception as failure:
            error = failure
        with self._on_stream():
            self._ranks.agree(error, self._digest.digest())

    def begin(self, parameters: Sequence[SharedParameter], own: Sequence[SharedParameter]) -> None:
        """Plan the rounds and begin to read the first two; inside :meth:`preparing`.

        Args:
            parameters: that are exchanged.
            own: that this rank reads for itself meanwhile.

        Raises:
            LoadError: if there is no memory for the exchange, or a file cannot be opened.
            UsageError: if the parameters are not this rank's share.
        """
        ranks, self._own = self._ranks, own
        buffers = _BUFFERS + (not all(item.in_order for item in parameters))
        each, nbytes = self._limit // buffers, 0
        for item in parameters:
            item.check_panels(ranks.rank, ranks.size)
            at_once = max(1, each // item.whole.nbytes)
            rounds = plan_rounds(item.experts, ranks.size, at_once)
            nbytes = max(nbytes, *(max(map(len, planned.readers)) * item.whole.nbytes for planned in rounds))
            flat = flat_bytes(item.parameter)
            self._rounds += [(item, flat, planned) for planned in rounds]
            self._digest.update(f"{item.record} {item.experts} {item.part.runs}".encode())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._loader.device))
        with self._on_stream():
            self._stages = self._allocate(buffers, nbytes)
            for number in range(2):
                self._read(number)

    def finish(self) -> None:
        """Exchange all rounds and queue the rest; :meth:`ExpertLoader.finish` is still to be called, in ``ending``.

        Raises:
            LoadError: if a rank failed or is missing, with its name.
        """
        with self._on_stream():
            for number in range(len(self._rounds)):
                self._exchange(number)
            self._end_exchange()
        self._stages, self._views = [], {}

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Return a context for what remains of a rank alone; at its end all succeed or fail together."""
        error: Exception | None = None
        try:
            yield
        except Exception as failure:
            error = failure
        with self._on_stream():
            self._ranks.agree(error)

    def complete(self) -> LoadReport:
        """Exchange all rounds and wait for everything; raises as :meth:`finish`."""
        self.finish()
        with self.ending():
            return self._loader.finish()

    def _exchange(self, number: int) -> None:
        """Exchange a round that this rank has begun to read, and begin to read the next but one.

        Up to here the ranks have read while the last round was exchanged; its memory is sent from again now.
        """
        (item, flat, planned), submission = self._rounds[number], self._reading.popleft()
        failure = None if submission is None else self._loader.wait_for(submission)
        self._error = self._error or failure
        self._end_exchange()
        views = self._views_of(number)
        views.panels.copy_(views.columns)
        try:
            self._read(number + 2)
            own_slots = sum(len(item.experts) for item in self._own)
            self._feed(own_slots * (number + 1) // len(self._rounds))
        except NvfpPrepError as error:
            self._error = self._error or error
        asked = number % _ROUNDS_A_QUESTION == _ROUNDS_A_QUESTION - 1 or number == len(self._rounds) - 1
        failed = self._error is not None if asked else None
        unit = item.part.nbytes
        received = self._stages[-1] if len(self._stages) > _BUFFERS else flat[planned.copies[0].slot * unit :]
        received = received[: planned.count * unit]
        self._end = self._ranks.exchange(received, views.sent, views.incoming, views.outgoing, failed)
        if len(self._stages) > _BUFFERS:
            slots, arrived = flat.view(-1, unit), received.view(-1, unit)
            torch._foreach_copy_(
                [slots[copy.slot : copy.slot + copy.count] for copy in planned.copies],
                [arrived[copy.position : copy.position + copy.count] for copy in planned.copies],
            )

    def _end_exchange(self) -> None:
        end, self._end = self._end, None
        if end is not None and end():
            self._ranks.agree(self._error)

    def _read(self, number: int) -> None:
        """Queue a round's reads of this rank."""
        if number >= len(self._rounds):
            return
        item, _, planned = self._rounds[number]
        experts = planned.readers[self._ranks.rank]
        self._reading.append(None)
        if experts:
            target = self._views_of(number).experts
            self._reading[-1] = self._loader.submit(item.path, item.record, item.whole, experts, target, item.crc32)

    def _views_of(self, number: int) -> _Views:
        item, _, planned = self._rounds[number]
        counts = tuple(map(len, planned.readers))
        key = (item.part, counts, number % 2)
        if key not in self._views:
            stage, sent = self._stages[number % 2], self._stages[2]
            self._views[key] = _Views.of(stage, sent, item, counts, self._ranks.rank)
        return self._views[key]

    def _feed(self, until: int) -> None:
        """Queue what this rank reads for itself, so many slots from the first one on."""
        begin = 0
        for item in self._own:
            end = begin + len(item.experts)
            first, stop = max(begin, self._fed), min(end, until)
            if first < stop:
                item.submit(self._loader, slice(first - begin, stop - begin))
            begin = end
        self._fed = until

    def _allocate(self, buffers: int, nbytes: int) -> list[torch.Tensor]:
        device = self._loader.device
        try:
            return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(buffers)]
        except (RuntimeError, MemoryError) as error:
            raise LoadError(
                f"no memory for the exchange of {format_nbytes(buffers * nbytes)} on {device}"
                f" ({str(error).splitlines()[0]})",
                next_step="Give the group fewer exchange_nbytes.",
            ) from error

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _on_network(path: Path) -> bool:
    try:
        return is_network_storage(path.stat().st_dev)
    except OSError:
        return False  # said with the right words when it is opened


@dataclass(frozen=True)
class _Views:
    """What a round has of the stages. Made once for all rounds of a kind: every call of torch waits for the GIL.

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
    ) -> _Views:
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
