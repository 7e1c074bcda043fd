"""Interleaved repetitions of several sides, their tables and rows, peaks of memory: shared by the load benchmarks."""

from __future__ import annotations

import gc
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep.load import LoadReport


@dataclass
class Side:
    """One way to load. ``run`` fills parameters that are there already; ``nbytes`` of parameters.

    ``facts`` go into the side's row as they are.
    """

    name: str
    nbytes: int
    run: Callable[[], LoadReport | None]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    report: LoadReport | None = None
    failed: str = ""

    def timed(self) -> None:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self.report = self.run()
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begun)

    def row(self) -> dict[str, Any]:
        """For JSON: seconds, rate, and what the loader says it read in the last turn."""
        if not self.seconds:
            return {"side": self.name, "failed": self.failed, **self.facts}
        row: dict[str, Any] = {"side": self.name, "nbytes": self.nbytes, **spread(self.seconds), **self.facts}
        row["gb_per_s"] = self.nbytes / row["median"] / 1e9
        if self.report is not None:
            row |= {
                "read_nbytes": self.report.counts.nbytes,
                "parameter_nbytes": self.report.nbytes,
                "counts": asdict(self.report.counts),
                "thread_seconds": asdict(self.report.times),
                "threads": self.report.threads,
                "last": self.seconds[-1],
            }
        return row


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(
    title: str, sides: list[Side], repeats: int, before: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Runs all sides in turn, ``repeats`` times after one warm-up; prints a table and returns its rows."""
    for turn in range(repeats + 1):
        for side in sides:
            if side.failed:
                continue
            if before is not None:
                before()
            try:
                side.timed()
            except Exception as error:
                side.failed = f"{type(error).__name__}: {error}"
                side.seconds.clear()
                traceback.print_exc()
            if turn == 0:
                side.seconds.clear()
    rows = [side.row() for side in sides]
    print(f"\n## {title}\n\n| side | min s | median s | max s | GB/s (median) | MB read / MB of parameters |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        if "failed" in row:
            print(f"| {row['side']} | failed: {row['failed']} | | | | |")
            continue
        read = f"{row['read_nbytes'] / 1e6:.1f} / {row['parameter_nbytes'] / 1e6:.1f}" if "counts" in row else ""
        print(
            f"| {row['side']} | {row['min']:.4f} | {row['median']:.4f} | {row['max']:.4f} | {row['gb_per_s']:.1f}"
            f" | {read} |",
            flush=True,
        )
    return rows


class MemoryWatch:
    """Peak of this process's anonymous memory and of the device memory that torch and the driver hand out."""

    def __enter__(self) -> MemoryWatch:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._stop = threading.Event()
        self.host = self._anonymous()
        self.host_peak = self.host
        self.torch_before = torch.cuda.memory_allocated()
        self.free = torch.cuda.mem_get_info()[0]
        self.free_least = self.free
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.extra_host = self.host_peak - self.host
        self.extra_torch = torch.cuda.max_memory_allocated() - self.torch_before
        self.extra_device = self.free - self.free_least

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.host_peak = max(self.host_peak, self._anonymous())
            self.free_least = min(self.free_least, torch.cuda.mem_get_info()[0])

    @staticmethod
    def _anonymous() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0
