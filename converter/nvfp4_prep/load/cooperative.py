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

import torch
import torch.distributed as dist

from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.errors import LoadError, NvfpPrepError
from nvfp4_prep.load.exchange_plan import Round, plan_rounds
from nvfp4_prep.load.loader import ExpertLoader
from nvfp4_prep.load.parameter_bytes import flat_bytes
from nvfp4_prep.load.ranks import Ranks
from nvfp4_prep.load.report import LoadReport
from nvfp4_prep.load.round_views import RoundViews
from nvfp4_prep.load.shared_parameter import SharedParameter
from nvfp4_prep.load.worker import Submission
from nvfp4_prep_kernels import ExpertSlice

__all__ = ["CooperativeGroup", "CooperativeLoad"]

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
        self._views: dict[tuple[ExpertSlice, tuple[int, ...], int], RoundViews] = {}
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

    def _views_of(self, number: int) -> RoundViews:
        item, _, planned = self._rounds[number]
        counts = tuple(map(len, planned.readers))
        key = (item.part, counts, number % 2)
        if key not in self._views:
            stage, sent = self._stages[number % 2], self._stages[2]
            self._views[key] = RoundViews.of(stage, sent, item, counts, self._ranks.rank)
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
