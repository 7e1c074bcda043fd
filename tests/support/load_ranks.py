"""Processes that load together over gloo, each with what it returned or raised."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Work = Callable[[int, int, dist.ProcessGroup], Any]


@dataclass(frozen=True)
class Outcome:
    """What one rank returned, or its error's class name and text; nothing of a rank that was killed."""

    value: Any = None
    error: str = ""
    text: str = ""


def run_ranks(
    work: Work, size: int, folder: Path, *, timeout: timedelta = timedelta(seconds=30)
) -> tuple[list[Outcome | None], float]:
    """Run ``work(rank, size, group)`` in ``size`` new processes.

    Returns:
        Each rank's outcome, and the seconds from the moment when all had joined the group to the last one's end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])  # once, and not in every rank
    ends, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(work, rank, size, folder, timeout, theirs))
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    outcomes: list[Outcome | None] = []
    begun: list[float] = []
    for end in ends:
        try:
            begun.append(end.recv())
            outcomes.append(end.recv())
        except EOFError:
            outcomes.append(None)
    ended = time.monotonic()
    for process in processes:
        process.join(5)
        process.kill()
        process.join()
    return outcomes, ended - max(begun)


def _main(work: Work, rank: int, size: int, folder: Path, timeout: timedelta, end: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{os.getppid()}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    dist.barrier()
    end.send(time.monotonic())
    group = dist.group.WORLD
    assert group is not None
    try:
        outcome = Outcome(work(rank, size, group))
    except Exception as error:
        outcome = Outcome(error=type(error).__name__, text=str(error))
    end.send(outcome)
    end.close()
    os._exit(0)  # without the end of gloo, which may wait for a rank that was killed
