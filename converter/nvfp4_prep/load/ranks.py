"""Collective calls of the ranks that load together: every failure is one error on all of them, and names its rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from nvfp4_prep.errors import LoadError, UsageError

__all__ = ["Ranks", "message_bytes", "message_of"]

_TEXT_NBYTES = 4096
_DIGEST_NBYTES = 32
_POLL_S = 0.0002
_ROLL_CALL_S = 10.0
"""Seconds to wait for the other ranks after a failed call, to name those that do not answer."""


def message_bytes(text: str, nbytes: int) -> bytes:
    """Return a text as ``nbytes`` bytes, cut or filled with zeros; a path that is not UTF-8 is spelled in escapes."""
    return text.encode(errors="backslashreplace")[:nbytes].ljust(nbytes, b"\0")


def message_of(raw: bytes) -> str:
    """Return the text of :func:`message_bytes`."""
    return raw.rstrip(b"\0").decode(errors="replace")


class Ranks:
    """The ranks of a process group. All of them make the same calls in the same order.

    Attributes:
        rank, size: this rank's place in the group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta) -> None:
        """Take a group over.

        Args:
            group: of which this process is a member.
            device: of the tensors that are exchanged.
            timeout: of one call.

        Raises:
            UsageError: if the group cannot exchange tensors of this device.
        """
        if not isinstance(group, dist.ProcessGroup):
            raise UsageError("is not a process group", actual=repr(group)[:80])
        self.group, self.device, self.timeout = group, device, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._calls = 0
        try:
            group._get_backend(device)
        except RuntimeError as error:
            raise UsageError(
                f"the process group cannot exchange tensors on {device} ({str(error).splitlines()[0]})",
                next_step="Give a group with NCCL for a GPU, with gloo for the CPU.",
            ) from error

    def agree(self, error: BaseException | None, digest: bytes = b"") -> None:
        """Raise on every rank if one of them has failed, or does not have the same digest.

        Raises:
            LoadError: with the first failed rank's error, or if a rank is missing.
            UsageError: if the digests differ.
        """
        text = "" if error is None else str(error) or type(error).__name__
        found = self.gather(digest.ljust(_DIGEST_NBYTES, b"\0")[:_DIGEST_NBYTES] + message_bytes(text, _TEXT_NBYTES))
        for rank, each in enumerate(found):
            message = message_of(each[_DIGEST_NBYTES:])
            if message:
                raise LoadError(f"rank {rank} of {self.size} failed: {message}") from error
        different = [rank for rank, each in enumerate(found) if each[:_DIGEST_NBYTES] != found[0][:_DIGEST_NBYTES]]
        if different:
            raise UsageError(
                "the ranks of the group do not load the same: layers, experts or options differ",
                expected="the same on all ranks as on rank 0",
                actual=f"others on rank {', '.join(map(str, different))}",
            )

    def gather(self, mine: bytes) -> list[bytes]:
        """Return what every rank gives, as many bytes on each; raises :class:`LoadError` if a rank is missing."""
        sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self.device)
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        self.complete([lambda: dist.all_gather(gathered, sent, group=self.group, async_op=True)])
        return [bytes(each.cpu().tolist()) for each in gathered]

    def exchange(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        incoming: list[int],
        outgoing: list[int],
        failed: bool | None,
    ) -> Callable[[], bool]:
        """Give each rank its part of ``sent``.

        On a GPU in the order of the current stream, which waits for the other ranks; on the CPU before it returns.

        Args:
            received: ``uint8``: what each rank sends to this one, in their order.
            sent: ``uint8``: what each rank gets, in their order.
            incoming: bytes from each rank.
            outgoing: bytes for each rank.
            failed: whether this rank has failed; what it sends is void then. None, on all ranks, to ask nobody.

        Returns:
            What is to be called before the next exchange: it waits for this one, with the timeout, and says whether a
            rank has failed.

        Raises:
            LoadError: if a rank is missing; as what it returns.
        """
        calls: list[Callable[[], Any]] = []
        if failed is not None:
            self._flag.fill_(failed)
            calls.append(lambda: dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.group, async_op=True))
        calls.append(
            lambda: dist.all_to_all_single(received, sent, incoming, outgoing, group=self.group, async_op=True)
        )
        done = self._order(self._begin(calls))

        def end() -> bool:
            self._wait(done)
            return failed is not None and bool(self._flag.item())

        return end

    def complete(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Make asynchronous calls and wait for them; raises :class:`LoadError` that says who is missing."""
        self._wait(self._order(self._begin(calls)))

    def _begin(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        self._calls += 1
        try:
            return [call() for call in calls]
        except RuntimeError as error:
            self._missing(error)

    def _order(self, works: Sequence[Any]) -> torch.cuda.Event | None:
        """Let the current stream wait for calls, and return the event of their end; on the CPU wait for them."""
        try:
            for work in works:
                # NCCL's wait with a time would end the process's communicators from its own thread.
                work.wait() if self.device.type == "cuda" else work.wait(self.timeout)
        except (RuntimeError, TimeoutError) as error:
            self._missing(error)
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def _wait(self, done: torch.cuda.Event | None) -> None:
        """Wait for an event of a GPU."""
        if done is None:
            return
        deadline = time.monotonic() + self.timeout.total_seconds()
        try:
            while not done.query():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no answer within {self.timeout.total_seconds():g} s")
                time.sleep(_POLL_S)
        except (RuntimeError, TimeoutError) as error:
            self._missing(error)

    def _missing(self, error: BaseException) -> NoReturn:
        """Raise the error of a call that failed: every rank that still lives comes here, the others are missing."""
        reason = str(error).splitlines()[0][:300]
        try:
            silent = self._silent()
        except RuntimeError as unreachable:
            who, reason = "another rank", f"{reason}; {str(unreachable).splitlines()[0][:200]}"
        else:
            named = f"rank {', '.join(map(str, silent))} of {self.size}"
            who = f"{named}, which does not answer," if silent else "another rank"
        raise LoadError(
            f"{who} did not take part in loading (seen by rank {self.rank})",
            actual=f"{type(error).__name__}: {reason}",
            next_step="Look at that rank's own messages, and start all ranks again.",
        ) from error

    def _silent(self) -> list[int]:
        store = dist.distributed_c10d._get_default_store()
        name = f"nvfp4-load/{self.group.group_name}/{self._calls}"
        store.set(f"{name}/{self.rank}", "lives")
        silent = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + min(_ROLL_CALL_S, self.timeout.total_seconds())
        while silent and time.monotonic() < deadline:
            time.sleep(0.05)
            silent = [rank for rank in silent if not store.check([f"{name}/{rank}"])]
        return silent
