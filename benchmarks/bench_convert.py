"""Convert against ``cp -r`` plus ``sync`` of the same bytes: ratios of wall times, interleaved, and peak memory.

    python benchmarks/bench_convert.py --repetitions 5 --work /data/bench            # one full Kimi-K2.5 layer, 9.8 GB
    python benchmarks/bench_convert.py --experts 64 --repetitions 3                  # a sixth of it

The smoke test, which reads source and target once more, is a side of its own, ``--smoke``. Seconds are from the start
of Python on; how long its imports take is said besides, because that depends on the machine and not on the bytes.
Needs three times the source's size on the disk of ``--work``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from page_cache import drop

from nvfp4_prep.commands.sample import KIMI_LAYER, write_sample

_CONVERT = """
import resource, sys, time
import torch, nvfp4_prep
begun = time.monotonic()
nvfp4_prep.convert(sys.argv[1], sys.argv[2], **({} if sys.argv[3] == "smoke" else {"smoke": None}))
print(begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def timed_copy(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - begin


def timed_convert(source: Path, target: Path, smoke: bool) -> tuple[float, float, int]:
    """Seconds from the start of Python to the end of a ``sync``, those of its imports, and peak resident bytes."""
    begin = time.monotonic()
    command = [sys.executable, "-c", _CONVERT, str(source), str(target), "smoke" if smoke else "alone"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    subprocess.run(["sync"], check=True)
    begun, peak = done.stdout.split()
    return time.monotonic() - begin, float(begun) - begin, int(peak)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=KIMI_LAYER.experts)
    parser.add_argument("--hidden", type=int, default=KIMI_LAYER.hidden)
    parser.add_argument("--intermediate", type=int, default=KIMI_LAYER.intermediate)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--smoke", action="store_true", help="also with its smoke test")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=options.work))
    try:
        sizes = {"experts": options.experts, "hidden": options.hidden, "intermediate": options.intermediate}
        nbytes = write_sample(folder / "source", replace(KIMI_LAYER, **sizes))
        copies, converts, smoked, starts, peaks = [], [], [], [], []
        for _ in range(options.repetitions):
            drop(files_of(folder / "source"))
            copies.append(timed_copy(folder / "source", folder / "copy"))
            shutil.rmtree(folder / "copy")
            for smoke in (False, True)[: 1 + options.smoke]:
                drop(files_of(folder / "source"))
                seconds, start, peak = timed_convert(folder / "source", folder / "out", smoke)
                (smoked if smoke else converts).append(seconds)
                starts.append(start)
                peaks += [] if smoke else [peak]
                shutil.rmtree(folder / "out")
    finally:
        shutil.rmtree(folder)
    figures = {
        **sizes,
        "nbytes": nbytes,
        "repetitions": options.repetitions,
        "copy": times(copies),
        "convert": times(converts),
        **({"with_smoke_test": times(smoked)} if smoked else {}),
        "imports": times(starts),
        "ratio": statistics.median(converts) / statistics.median(copies),
        "peak_nbytes": max(peaks),
    }
    report(figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def times(seconds: list[float]) -> dict[str, Any]:
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds), "seconds": seconds}


def report(figures: dict[str, Any]) -> None:
    nbytes = figures["nbytes"]
    print(
        f"{nbytes / 1e9:.2f} GB, {os.cpu_count()} CPUs, {figures['repetitions']} repetitions, interleaved, cold source"
    )
    print(f"{'':24s}{'min s':>8s}{'median s':>10s}{'max s':>8s}{'GB/s':>8s}")
    named = {"copy": "cp -r and sync", "convert": "convert and sync", "with_smoke_test": "with its smoke test"}
    for name, row in ((named[key], figures[key]) for key in named if key in figures):
        rate = nbytes / row["median"] / 1e9
        print(f"{name:24s}{row['min']:8.2f}{row['median']:10.2f}{row['max']:8.2f}{rate:8.2f}")
    print(f"of which imports {figures['imports']['median']:.2f} s")
    print(f"ratio of medians {figures['ratio']:.2f}; peak resident memory {figures['peak_nbytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
