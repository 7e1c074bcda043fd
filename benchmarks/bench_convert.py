"""Convert against ``cp -r`` plus ``sync`` of the same bytes: ratios of wall times, interleaved, and peak memory.

    python benchmarks/bench_convert.py --repetitions 5 --work /data/bench            # one full Kimi-K2.5 layer, 9.8 GB
    python benchmarks/bench_convert.py --experts 64 --repetitions 3                  # a sixth of it

Needs three times the source's size on the disk of ``--work``. Writes a JSON file with every time beside the table.
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

from nvfp4_prep.sample import KIMI_LAYER, write_sample

_CONVERT = (
    "import resource, sys, nvfp4_prep;"
    "nvfp4_prep.convert(sys.argv[1], sys.argv[2]);"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
)


def drop_cache(folder: Path) -> None:
    """Asks the kernel to forget the files, so that every side reads from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed_copy(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - begin


def timed_convert(source: Path, target: Path) -> tuple[float, int]:
    """Seconds from the start of Python to the end of a final ``sync``, and peak resident bytes."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), str(target)], check=True, capture_output=True, text=True
    )
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - begin, int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=KIMI_LAYER.experts)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=options.work))
    try:
        nbytes = write_sample(folder / "source", replace(KIMI_LAYER, experts=options.experts))
        copies, converts, peaks = [], [], []
        for _ in range(options.repetitions):
            drop_cache(folder / "source")
            copies.append(timed_copy(folder / "source", folder / "copy"))
            shutil.rmtree(folder / "copy")
            drop_cache(folder / "source")
            seconds, peak = timed_convert(folder / "source", folder / "out")
            converts.append(seconds)
            peaks.append(peak)
            shutil.rmtree(folder / "out")
    finally:
        shutil.rmtree(folder)
    report(nbytes, copies, converts, peaks, options.json)


def report(nbytes: int, copies: list[float], converts: list[float], peaks: list[int], target: Path | None) -> None:
    print(f"{nbytes / 1e9:.2f} GB, {os.cpu_count()} CPUs, {len(copies)} repetitions, interleaved, cold source")
    print(f"{'':24s}{'min s':>8s}{'median s':>10s}{'max s':>8s}{'GB/s':>8s}")
    for name, times in (("cp -r and sync", copies), ("convert and sync", converts)):
        middle = statistics.median(times)
        print(f"{name:24s}{min(times):8.2f}{middle:10.2f}{max(times):8.2f}{nbytes / middle / 1e9:8.2f}")
    ratio = statistics.median(converts) / statistics.median(copies)
    print(f"ratio of medians {ratio:.2f}; peak resident memory {max(peaks) / 1e9:.2f} GB")
    if target is not None:
        value = {"nbytes": nbytes, "copy_s": copies, "convert_s": converts, "peak_nbytes": peaks, "ratio": ratio}
        target.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
