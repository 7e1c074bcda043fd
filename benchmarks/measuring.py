"""Interleaved repetitions of several sides, tables, JSON, peaks of memory: shared by the load benchmarks."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep.load import LoadReport

RESULTS: dict[str, Any] = {}


@dataclass
class Side:
    """One way to load. ``run`` fills parameters that are there already; ``nbytes`` of parameters."""

    name: str
    nbytes: int
    run: Callable[[], LoadReport | None]
    seconds: list[float] = field(default_factory=list)
    report: LoadReport | None = None


def timed(side: Side) -> None:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    side.report = side.run()
    torch.cuda.synchronize()
    side.seconds.append(time.perf_counter() - begun)


def compare(title: str, sides: list[Side], repeats: int, before: Callable[[], None] | None = None) -> None:
    """Runs all sides in turn, ``repeats`` times after one warm-up, and prints a table."""
    failed: dict[str, str] = {}
    for turn in range(repeats + 1):
        for side in sides:
            if side.name in failed:
                continue
            if before is not None:
                before()
            try:
                timed(side)
            except Exception:
                failed[side.name] = traceback.format_exc().strip().splitlines()[-1]
                traceback.print_exc()
            if turn == 0:
                side.seconds.clear()
    print(f"\n## {title}\n\n| side | min s | median s | max s | GB/s (median) | MB read / MB of parameters | reads |")
    print("|---|---|---|---|---|---|---|")
    rows = RESULTS.setdefault("tables", {}).setdefault(title, [])
    for side in sides:
        if not side.seconds:
            print(f"| {side.name} | failed: {failed.get(side.name)} | | | | | |")
            continue
        low, middle, high = min(side.seconds), statistics.median(side.seconds), max(side.seconds)
        rate = side.nbytes / middle / 1e9
        read, row = "", {"side": side.name, "min": low, "median": middle, "max": high, "gb_per_s": rate}
        if side.report is not None:
            report = side.report
            read = f"{report.counts.nbytes / 1e6:.1f} / {report.nbytes / 1e6:.1f} | {report.counts.reads}"
            row |= {"counts": vars(report.counts), "thread_seconds": vars(report.times), "threads": report.threads}
        rows.append(row)
        print(f"| {side.name} | {low:.4f} | {middle:.4f} | {high:.4f} | {rate:.1f} | {read or ' |'} |", flush=True)


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


def drop(paths: list[Path]) -> None:
    """Takes files out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def section(name: str, run: Callable[[], None]) -> None:
    begun = time.perf_counter()
    try:
        run()
    except Exception:
        print(f"\nsection {name} failed:\n{traceback.format_exc()}", flush=True)
        RESULTS.setdefault("failed", []).append(name)
    gc.collect()
    torch.cuda.empty_cache()
    print(f"({name}: {time.perf_counter() - begun:.1f} s)", flush=True)
