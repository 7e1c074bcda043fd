"""Loading of prepared experts by a server's ranks: each by itself, or the tensor-parallel ranks of a host together."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nvfp4_prep.errors import NvfpPrepError, ServingError
from nvfp4_prep.load import CooperativeGroup, ExpertLoader, GroupLoader, TakesParameters
from nvfp4_prep.load.ranks import Ranks

__all__ = ["WAIT", "Alone", "Cooperation", "ServerRanks", "server_ranks"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HOST_NBYTES = 128
WAIT = timedelta(minutes=30)
"""For the slowest rank to have loaded everything that is not an expert, perhaps from network storage.

A rank whose process ends is noticed at once, because its connections close: only one that hangs is waited for, or one
whose host is gone.
"""
_LONGEST_WAIT_S = 24 * 60 * 60


@dataclass(frozen=True)
class ServerRanks:
    """The tensor-parallel ranks of a server, as it names them.

    Attributes:
        group: for exchanges of the device's memory.
        cpu_group: the same ranks, on the CPU.
    """

    group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup


@dataclass(frozen=True)
class Alone:
    """The reason why each rank loads by itself."""

    reason: str


def server_ranks(coordinator: Any, server: str) -> ServerRanks | Alone:
    """Return the ranks of a server's group coordinator, or why they cannot load together."""
    groups = [getattr(coordinator, name, None) for name in ("device_group", "cpu_group")]
    found = [group for group in groups if isinstance(group, dist.ProcessGroup)]
    if len(found) < len(groups):
        return Alone(f"this version of {server} names no process groups of its tensor-parallel ranks")
    if found[0].size() == 1:
        return Alone("there is one tensor-parallel rank")
    return ServerRanks(*found)


@dataclass(frozen=True)
class Cooperation:
    """The user's choice about loading together.

    Attributes:
        wanted: off where the user said so.
        exchange_nbytes: see :class:`nvfp4_prep.load.CooperativeGroup`.
        wait_s: seconds that a rank waits for one that hangs.
    """

    wanted: bool = True
    exchange_nbytes: int = CooperativeGroup.exchange_nbytes
    wait_s: float = WAIT.total_seconds()

    @classmethod
    def take(cls, extra: dict[str, Any]) -> Cooperation:
        """Take ``cooperative``, ``exchange_nbytes`` and ``wait_s`` out of a loader's extra config.

        Raises:
            ServingError: if a value is unusable.
        """
        wanted = extra.pop("cooperative", cls.wanted)
        nbytes = extra.pop("exchange_nbytes", cls.exchange_nbytes)
        wait_s = extra.pop("wait_s", cls.wait_s)
        if type(wanted) is not bool:
            raise ServingError("unusable option cooperative", expected="true or false", actual=repr(wanted))
        if type(nbytes) is not int or nbytes < 1:
            raise ServingError("unusable option exchange_nbytes", expected="a number of bytes", actual=repr(nbytes))
        if type(wait_s) not in (int, float) or not 0 < wait_s <= _LONGEST_WAIT_S:
            raise ServingError("unusable option wait_s", expected="seconds, a day at most", actual=repr(wait_s))
        return cls(wanted, nbytes, wait_s)

    @contextlib.contextmanager
    def loading(
        self,
        find: Callable[[], ServerRanks | Alone],
        device: torch.device,
        make: Callable[[], ExpertLoader],
        tell: Callable[..., None],
    ) -> Iterator[TakesParameters]:
        """Yield what loads this rank's parameters; its ``finish`` is to be called inside.

        Args:
            find: asks the server for its ranks.
            device: of the parameters.
            make: makes this rank's loader.
            tell: logs a format and its arguments.

        Raises:
            LoadError: where ranks load together, and one of them fails before the end of ``finish`` or is missing: on
                all of them, with the rank's name.
        """
        ranks = self._ranks(find, device)
        if isinstance(ranks, Alone):
            tell("Each rank loads its prepared experts by itself: %s.", ranks.reason)
            with make() as loader, _abandoned_on_failure(loader):
                yield loader
            return
        group, waiting = ranks
        tell("The %d tensor-parallel ranks of this host load prepared experts together.", waiting.size)
        loading: GroupLoader | None = None
        try:
            with make() as loader, _abandoned_on_failure(loader):
                loading = GroupLoader(group, waiting, loader)
                yield loading
            if not loading.exchanged:
                tell("Nothing was exchanged: the experts are not divided between these %d ranks alone.", waiting.size)
        except Exception as error:
            if loading is None or not loading.answered:
                tell("Loading failed (%s); the other ranks of this host are informed at their next step.", error)
                waiting.agree(error)
            raise

    def _ranks(
        self, find: Callable[[], ServerRanks | Alone], device: torch.device
    ) -> tuple[CooperativeGroup, Ranks] | Alone:
        """Return the ranks that load together; the same answer on all of them."""
        if not self.wanted:
            return Alone('"cooperative" is false')
        found = find()
        if isinstance(found, Alone):
            return found
        group = CooperativeGroup(found.group, self.exchange_nbytes)
        waiting = Ranks(found.cpu_group, torch.device("cpu"), timedelta(seconds=self.wait_s))
        try:
            group.on(device)
            problem = b""
        except NvfpPrepError as error:
            problem = str(error).encode()
        answers = waiting.gather((_host() + b"\0" + problem)[:_HOST_NBYTES].ljust(_HOST_NBYTES, b"\0"))
        hosts, problems = zip(*(answer.rstrip(b"\0").partition(b"\0")[::2] for answer in answers), strict=True)
        if any(problems):
            return Alone(next(filter(None, problems)).decode(errors="replace"))
        if len(set(hosts)) > 1:
            return Alone("the tensor-parallel ranks are on several hosts")
        return group, waiting


def _host() -> bytes:
    """Return what tells one running system from another, also across containers."""
    try:
        return _BOOT_ID.read_bytes().strip()
    except OSError:
        return platform.node().encode()[: _HOST_NBYTES // 2]


@contextlib.contextmanager
def _abandoned_on_failure(loader: ExpertLoader) -> Iterator[None]:
    try:
        yield
    except BaseException:
        loader.abandon()
        raise
