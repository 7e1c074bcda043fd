"""The processes of ``bench_load``, one a rank."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from nvfp4_prep.commands.bench_load_rank import RankJob, RankTurn, run_rank
from nvfp4_prep.errors import LoadError

__all__ = ["RankProcesses"]

_START_S = 300.0
_TURN_S = 3600.0


class RankProcesses:
    """The processes. Use it as a context."""

    def __init__(self, jobs: Sequence[RankJob]) -> None:
        self._jobs = jobs
        self._ends: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> RankProcesses:
        context = multiprocessing.get_context("spawn")  # a process that knows CUDA cannot be forked
        try:
            for rank, job in enumerate(self._jobs):
                mine, theirs = context.Pipe()
                process = context.Process(target=run_rank, args=(job, rank, len(self._jobs), theirs), daemon=True)
                process.start()
                theirs.close()
                self._ends.append(mine)
                self._processes.append(process)
            self._hear(_START_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for end in self._ends:
            end.close()

    def turn(self) -> tuple[RankTurn, ...]:
        """Let all ranks load at once."""
        for rank, end in enumerate(self._ends):
            try:
                end.send("load")
            except OSError as error:
                raise self._lost(rank) from error
        return tuple(self._hear(_TURN_S))

    def _hear(self, limit_s: float) -> list[Any]:
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(limit_s):
                raise LoadError(f"rank {rank} did not answer within {limit_s:g} s", where=self._jobs[rank].device)
            try:
                answer = end.recv()
            except EOFError as error:
                raise self._lost(rank) from error
            if isinstance(answer, str):
                raise LoadError(f"rank {rank} of {len(self._jobs)} failed: {answer}", where=self._jobs[rank].device)
            answers.append(answer)
        return answers

    def _lost(self, rank: int) -> LoadError:
        self._processes[rank].join(5)
        return LoadError(
            f"the process of rank {rank} ended (exit code {self._processes[rank].exitcode})",
            where=self._jobs[rank].device,
            next_step="Where the system ended it for its memory: try fewer --layers.",
        )
