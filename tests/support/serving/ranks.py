"""Runs jobs in two processes that stay alive, forked from one that has imported vLLM and done nothing else with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from support.serving.compare import Comparison, Job, Outcome
from support.serving.vllm_on_cpu import bring_up, freeze_imports, meeting_point

WORLD = 2
TIMEOUT_S = 180


class Broken(str):
    """The traceback of a rank that failed."""

    __slots__ = ()


class Ranks:
    """Two processes, rank 0 and rank 1. To be made before this process has loaded anything, which starts threads."""

    def __init__(self) -> None:
        assert threading.active_count() == 1, "a child of a process with threads may hang"
        bring_up()
        freeze_imports()
        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self._ends: list[Connection] = [end for end, _ in pipes]
        self._processes = [context.Process(target=_serve, args=(rank, pipes), daemon=True) for rank in range(WORLD)]
        for process in self._processes:
            process.start()
        for _, other in pipes:
            other.close()

    def run(self, job: Job) -> Sequence[Outcome]:
        """One job in both ranks; raises ``RuntimeError`` with the traceback of a rank that failed."""
        reasons = self._ask(replace(job, world=WORLD, meetings=(meeting_point(), meeting_point())))
        if any(reasons):
            return [Outcome(unsupported=reason) for reason in reasons if reason]
        return self._ask("prepared")

    def run_to_failure(self, job: Job) -> list[str | None]:
        """One job whose prepared load fails in one rank: each rank's traceback, nothing of one that was killed."""
        self._ask(replace(job, world=WORLD, meetings=(meeting_point(), meeting_point())))
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

    def _ask(self, request: Job | str) -> list[Any]:
        for end in self._ends:
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
        """Ends both processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, pipes: Sequence[tuple[Connection, Connection]]) -> None:
    end = pipes[rank][1]
    for each in {each for pipe in pipes for each in pipe} - {end}:
        each.close()  # so that the end of a process closes its pipe
    os.environ["RANK"] = str(rank)  # what a launcher sets, and vLLM's data parallelism reads
    from nvfp4_prep.vllm import register

    register()
    comparison: Comparison | None = None
    while True:
        try:
            request: Any = end.recv()
        except EOFError:
            return
        try:
            if isinstance(request, Job):
                comparison = Comparison(request, rank)
                end.send(comparison.load_source())
            else:
                end.send(comparison.load_prepared() if comparison else Broken("no job"))
        except BaseException:
            end.send(Broken(f"rank {rank}: {traceback.format_exc()}"))
