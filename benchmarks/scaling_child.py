"""One timed command of bench_scaling.py, in a process of its own, on given cores; or its data, or the rates of a core.

    python benchmarks/scaling_child.py '{"task": "convert", "cores": [0, 1], "source": "/dev/shm/s", "target": ...}'

Prints one line of JSON. ``PYTHONPATH`` says which tree is measured. torch is imported after the cores are set, because
it takes its number of threads from them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scaling_limit

_MIB = 2**20


def prepare(order: dict[str, Any]) -> Callable[[], None]:
    """Import everything that a command needs; what is returned does the work."""
    import nvfp4_prep

    task, source, checkpoint, target = (order.get(name) for name in ("task", "source", "checkpoint", "target"))
    if task == "plan":
        plan = nvfp4_prep.plan
        return lambda: _done(plan(source))
    if task == "convert":
        convert = nvfp4_prep.convert
        # The smoke run is a part of its own in `make bench`; trees that have none do not take the argument.
        options = {"smoke": None} if "smoke" in inspect.signature(convert).parameters else {}
        return lambda: _done(convert(source, target, **options))
    if task in ("verify", "verify --source"):
        verify = nvfp4_prep.verify
        against = source if task == "verify --source" else None
        return lambda: _clean(verify(checkpoint, source=against))
    if task == "restore":
        restore = nvfp4_prep.restore
        return lambda: _done(restore(checkpoint, target))
    relayout = nvfp4_prep.relayout
    return lambda: _done(relayout(checkpoint, target, gate_up_block=32))


def _done(result: object) -> None:
    """Drop a result that says nothing about success: these commands raise."""
    del result


def _clean(report: Any) -> None:
    if not report.ok:
        raise SystemExit(f"verify found something: {report}")


def timed(order: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the work without start-up, and this process's peak."""
    work = prepare(order)
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def make(order: dict[str, Any]) -> dict[str, Any]:
    """Write a sample; returns its size and its number of expert tensors."""
    from nvfp4_prep import SampleModel, write_sample

    model = SampleModel(**order["model"])
    nbytes = write_sample(order["target"], model)
    return {"nbytes": nbytes, "expert_tensors": (model.layers - 1) * model.experts * 12}


def rates() -> dict[str, float]:
    """What one core does: bytes a second of sha256, and of a copy from memory to memory (counted once)."""
    chunk = os.urandom(_MIB) * 64
    large, copy = bytearray(os.urandom(_MIB) * 256), bytearray(256 * _MIB)
    digest = hashlib.sha256()

    def move() -> None:
        copy[:] = large

    return {
        "sha256_per_s": _rate(lambda: digest.update(chunk), len(chunk)),
        "memcpy_per_s": _rate(move, len(large)),
    }


def _rate(work: Callable[[], None], nbytes: int) -> float:
    work()
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return nbytes / best


def main() -> None:
    order = json.loads(sys.argv[1])
    os.sched_setaffinity(0, order["cores"])
    if order["task"] == "make":
        answer = make(order)
    elif order["task"] == "rates":
        answer = rates()
    elif order["task"] == "limit":
        answer = scaling_limit.measure(Path(order["folder"]), len(os.sched_getaffinity(0)))
    else:
        answer = timed(order)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
