"""Runs jobs in processes that stay alive, one a rank.

They are forked from a process that has imported SGLang and done nothing else, which takes most of the time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from sglang_compare import Comparison, Job, Outcome
from sglang_on_cpu import bring_up, meeting_point, plug_in

PRELOADED = "sglang_preloaded"
TIMEOUT_S = 180


class Broken(str):
    """The traceback of a rank that failed."""

    __slots__ = ()


class Ranks:
    """Processes of ranks 0, 1, …"""

    def __init__(self, world: int = 2) -> None:
        start_preloading()
        context = multiprocessing.get_context("forkserver")
        pipes = [context.Pipe() for _ in range(world)]
        self._ends: list[Connection] = [end for end, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, other, sys.path), daemon=True)
            for rank, (_, other) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, job: Job) -> Sequence[Outcome]:
        """One job in both ranks; raises ``RuntimeError`` with the traceback of a rank that failed."""
        reasons = self._ask(replace(job, meetings=(meeting_point(), meeting_point())))
        if any(reasons):
            return [Outcome(unsupported=reason) for reason in reasons if reason]
        return self._ask("prepared")

    def run_to_failure(self, job: Job) -> list[str | None]:
        """One job whose prepared load fails in one rank: each rank's traceback, nothing of one that was killed."""
        self._ask(replace(job, meetings=(meeting_point(), meeting_point())))
        for end in self._ends:
            end.send("prepared")
        replies: list[str | None] = []
        for end in self._ends:
            assert end.poll(TIMEOUT_S)
            try:
                reply = end.recv()
            except EOFError:
                reply = None
            assert reply is None or isinstance(reply, Broken), reply
            replies.append(reply)
        return replies

    def each(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each rank's own call returns; raises as :meth:`run`."""
        return self._ask(*calls)

    def _ask(self, *requests: Any) -> list[Any]:
        """One answer a rank, to the same request or to one of its own."""
        for end, request in zip(self._ends, requests if len(requests) > 1 else requests * len(self._ends), strict=True):
            end.send(request)
        replies = []
        for rank, end in enumerate(self._ends):
            if not end.poll(TIMEOUT_S):
                self.close()
                raise RuntimeError(f"rank {rank} did not answer within {TIMEOUT_S} s")
            replies.append(end.recv())
        broken = [str(reply) for reply in replies if isinstance(reply, Broken)]
        if broken:
            raise RuntimeError("\n".join(broken))
        return replies

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def start_preloading() -> None:
    """Start the process that ranks are forked from, unless it runs; it imports SGLang while this one goes on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED])
    with _environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """The process that ranks are forked from finds modules by its environment alone."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(rank: int, end: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    bring_up()
    plug_in()

    comparison: Comparison | None = None
    while True:
        try:
            request: Any = end.recv()
        except EOFError:
            return
        try:
            if callable(request):
                end.send(request())
            elif isinstance(request, Job):
                comparison = Comparison(request, rank)
                end.send(comparison.load_source())
            else:
                end.send(comparison.load_prepared() if comparison else Broken("no job"))
        except BaseException:
            end.send(Broken(f"rank {rank}: {traceback.format_exc()}"))
