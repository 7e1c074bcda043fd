"""The rate of a conversion's work on so many cores when nothing is shared: the limit of bench_scaling.py.

    python benchmarks/scaling_limit.py --processes 16 --folder /dev/shm

Each process does to its own bytes what ``convert`` does to each byte of w13: reads it from a file in memory, prepares
it, inverts and compares it, takes its CRC-32, the sha256 of source and result, and writes it to a file. No lock, no
journal, no interpreter is shared; what two processes still have in common is the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

HIDDEN, INTERMEDIATE = 7168, 2048
PROJECTION_NBYTES = HIDDEN // 2 * INTERMEDIATE
SOURCE_PROJECTIONS = 20
EXPERTS = 40
STEPS = ("read", "layout", "crc32", "sha256", "write")


class Worker:
    """One process's files and digests."""

    def __init__(self, folder: Path, number: int) -> None:
        import torch

        from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor

        torch.set_num_threads(1)
        self._layout = MoeLayout.cutedsl(gated=True)
        self._dims = MoeDims(experts=1, intermediate=INTERMEDIATE, hidden=HIDDEN)
        self._tensor = PreparedTensor.W13_WEIGHT
        self._source = os.open(folder / "source", os.O_RDONLY)
        self._out = os.open(folder / f"out-{number}", os.O_RDWR | os.O_CREAT)
        os.ftruncate(self._out, EXPERTS * 2 * PROJECTION_NBYTES)
        self._sha256 = hashlib.sha256(), hashlib.sha256()
        self.cpu_s = dict.fromkeys(STEPS, 0.0)
        self._since = 0.0

    def _step(self, name: str) -> None:
        now = time.thread_time()
        self.cpu_s[name] += now - self._since
        self._since = now

    def expert(self, number: int) -> None:
        """All the work on gate and up of one expert."""
        from nvfp4_prep._util.buffers import byte_view, crc32_each, empty_bytes, empty_like_pooled, same_bytes

        self._since = time.thread_time()
        raws = [empty_bytes(PROJECTION_NBYTES) for _ in range(2)]
        for half, raw in enumerate(raws):
            position = (2 * number + half) % SOURCE_PROJECTIONS
            os.preadv(self._source, [byte_view(raw)], position * PROJECTION_NBYTES)
        self._step("read")
        parts = [raw.view(1, INTERMEDIATE, HIDDEN // 2) for raw in raws]
        prepared = self._layout.apply(self._tensor, *parts, empty=empty_like_pooled)
        inverted = self._layout.invert(self._tensor, prepared, self._dims, empty_like_pooled)
        if not all(map(same_bytes, parts, inverted)):
            raise SystemExit("the inverse does not give the source back")
        self._step("layout")
        crc32_each(prepared)
        self._step("crc32")
        for raw in raws:
            self._sha256[0].update(byte_view(raw))
        self._sha256[1].update(byte_view(prepared))
        self._step("sha256")
        os.pwrite(self._out, byte_view(prepared), number * 2 * PROJECTION_NBYTES)
        self._step("write")


def work(folder: Path, number: int, start: Barrier, answers: Queue[tuple[float, dict[str, float]]]) -> None:
    from nvfp4_prep._util.buffers import buffers_kept

    worker = Worker(folder, number)
    with buffers_kept(1 << 30):
        worker.expert(0)
        worker.cpu_s = dict.fromkeys(STEPS, 0.0)
        start.wait()
        begun = time.perf_counter()
        for expert in range(EXPERTS):
            worker.expert(expert)
        answers.put((time.perf_counter() - begun, worker.cpu_s))


def measure(folder: Path, processes: int) -> dict[str, object]:
    """Bytes a second of all processes, and CPU seconds a GB of each step."""
    folder = Path(tempfile.mkdtemp(prefix="scaling-limit-", dir=folder))
    (folder / "source").write_bytes(os.urandom(PROJECTION_NBYTES) * SOURCE_PROJECTIONS)
    context = multiprocessing.get_context("spawn")
    answers, start = context.Queue(), context.Barrier(processes)
    started = [context.Process(target=work, args=(folder, number, start, answers)) for number in range(processes)]
    for process in started:
        process.start()
    found = [answers.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    shutil.rmtree(folder)
    nbytes = processes * EXPERTS * 2 * PROJECTION_NBYTES
    steps = {name: sum(cpu_s[name] for _, cpu_s in found) / nbytes * 1e9 for name in STEPS}
    return {"bytes_per_s": nbytes / max(seconds for seconds, _ in found), "cpu_s_per_gb": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, options.processes)))


if __name__ == "__main__":
    main()
