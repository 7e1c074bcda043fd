"""Client of :mod:`faults.fork_server`: starts it, sends it commands, and gives back how they ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECONDS = 60
"""A command on a tiny checkpoint takes a fraction of a second: one that lives so long hangs (exit code -14)."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, as fault_points.c takes it.

    Attributes:
        prefix: real path below which calls count.
        at: the call that breaks, from 1; 0 only counts.
        error: errno, or 0 for SIGKILL.
        for_good: whether all later calls fail, too.
        trace: file that gets one line a counted call.
    """

    prefix: str
    at: int = 0
    error: int = 0
    for_good: bool = False
    trace: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a command ended; a negative code is the number of the signal that ended it."""

    code: int
    points: int
    broken: int
    max_rss_nbytes: int
    outside: tuple[str, ...]
    stdout: bytes
    stderr: bytes

    def __str__(self) -> str:
        tail = (self.stdout[-300:] + self.stderr[-1500:]).decode("utf-8", "backslashreplace")
        return f"exit code {self.code}: {tail}"


class ForkServer:
    """A running server; use as a context manager. One request at a time: take several servers for several cores."""

    def __init__(self, scratch: Path, library: Path | None = None, variables: Mapping[str, str] | None = None) -> None:
        """Start the server.

        Args:
            scratch: folder for the output of the commands; made here.
            library: the fault library, if faults are wanted.
            variables: more environment variables.
        """
        self._scratch = scratch
        scratch.mkdir(parents=True)
        quiet = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **quiet, **(variables or {})}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        command = [sys.executable, "-m", "faults.fork_server", str(scratch)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, cwd=scratch
        )
        self.rss_nbytes = 0

    def __enter__(self) -> Self:
        """Wait until the server has imported everything."""
        self.rss_nbytes = self._read()["rss_nbytes"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(SECONDS)
        self._process.stdout.close()

    def run(
        self,
        arguments: list[str],
        *,
        program: str = "cli",
        fault: Fault | None = None,
        guard: list[str] | None = None,
        seconds: int = SECONDS,
    ) -> Outcome:
        """Run one command in a child of its own.

        Args:
            arguments: of the program; the command line without its name.
            program: ``cli`` or ``load``.
            fault: what goes wrong.
            guard: folders outside which no file may be changed; attempts are listed in the outcome.
            seconds: after which the command is ended by SIGALRM.
        """
        request = {"program": program, "arguments": arguments, "guard": guard, "seconds": seconds}
        request["fault"] = None if fault is None else asdict(fault)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        stdout, stderr = ((self._scratch / name).read_bytes() for name in ("stdout", "stderr"))
        outside = tuple(answer.pop("outside"))
        return Outcome(**answer, outside=outside, stdout=stdout, stderr=stderr)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
