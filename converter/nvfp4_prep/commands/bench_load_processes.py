"""The processes of ``bench_load``, one a rank."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from nvfp4_prep.commands.bench_load_rank import RankJob, RankTurn
from nvfp4_prep.errors import LoadError

__all__ = ["RankProcesses"]

_START_S = 300.0
_TURN_S = 3600.0
_RANK = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its processes
sys.path[:] = sys.argv[2:]
from multiprocessing.connection import Connection
from nvfp4_prep.commands.bench_load_rank import run_rank
end = Connection(int(sys.argv[1]))
run_rank(*end.recv(), end)
"""
"""The program of a rank. It is not multiprocessing's spawn, which runs the caller's script again in every process, and
with it the call that started them, unless the script guards itself against that."""

_START_STEP = "Check that Python's program can be started from there, and the limits of processes and memory."
_FLAGS = {
    "isolated": "-I",
    "ignore_environment": "-E",
    "no_user_site": "-s",
    "no_site": "-S",
    "dont_write_bytecode": "-B",
}
"""Options of the interpreter that say what is read, run and written before the program begins, by their names in
``sys.flags``, which is documented; the standard library's own function for this is private."""


def _interpreter() -> list[str]:
    """Return the interpreter's command: this one, under the options that this process was started with.

    Raises:
        LoadError: if Python does not know its program, as where it is embedded in another one.
    """
    if not sys.executable:
        raise LoadError(
            "Python does not know its own program (sys.executable is empty), so no rank can be started",
            next_step="Run nvfp4-prep bench-load from a shell, or set sys.executable to a Python with this package.",
        )
    optimize = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    given = [option for name, option in _FLAGS.items() if getattr(sys.flags, name)]
    return [sys.executable, "-P", "-X", f"utf8={sys.flags.utf8_mode}", *optimize, *given]


class RankProcesses:
    """The processes, new ones: a process that knows CUDA cannot be forked. Use it as a context."""

    def __init__(self, jobs: Sequence[RankJob]) -> None:
        self._jobs = jobs
        self._ends: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RankProcesses:
        try:
            for _ in self._jobs:
                self._start()
            for rank, job in enumerate(self._jobs):
                self._tell(rank, (job, rank, len(self._jobs)))
            self._hear(_START_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for end in self._ends:
            end.close()

    def turn(self) -> tuple[RankTurn, ...]:
        """Let all ranks load at once."""
        for rank in range(len(self._jobs)):
            self._tell(rank, "load")
        return tuple(self._hear(_TURN_S))

    def _start(self) -> None:
        mine, theirs = Pipe()
        self._ends.append(mine)
        with theirs:
            number = theirs.fileno()
            places = (place for place in sys.path if isinstance(place, str))
            command = [*_interpreter(), "-c", _RANK, str(number), *places]
            try:
                process = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL)
            except OSError as error:
                raise LoadError(
                    f"a process could not be started ({error.strerror})", where=command[0], next_step=_START_STEP
                ) from error
            self._processes.append(process)

    def _tell(self, rank: int, message: object) -> None:
        try:
            self._ends[rank].send(message)
        except OSError as error:
            raise self._lost(rank) from error

    def _hear(self, limit_s: float) -> list[Any]:
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(limit_s):
                raise LoadError(f"rank {rank} did not answer within {limit_s:g} s", where=self._jobs[rank].device)
            try:
                answer = end.recv()
            except (EOFError, ConnectionResetError) as error:
                raise self._lost(rank) from error
            if isinstance(answer, str):
                raise LoadError(f"rank {rank} of {len(self._jobs)} failed: {answer}", where=self._jobs[rank].device)
            answers.append(answer)
        return answers

    def _lost(self, rank: int) -> LoadError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(5)
        return LoadError(
            f"the process of rank {rank} ended (exit code {self._processes[rank].returncode})",
            where=self._jobs[rank].device,
            next_step="Where the system ended it for its memory: try fewer --layers.",
        )
