"""Fuzz run of bounded time: ``make fuzz FUZZ_SECONDS=120``; ``SEED=N`` repeats a run, ``SEED=N:M`` one case of it."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from faults.fault_library import build_library, missing_tool
from faults.fork_client import ForkServer
from faults.known_failures import finding_of
from faults.scenarios import World
from faults.settings import SERVERS, working_folder
from fuzz.fuzzer import Finding, Fuzzer


def case_names(seed: str, count: int | None = None) -> Iterator[str]:
    """Return the names of the cases of a seed: one if it names one, else so many, else without end."""
    if ":" in seed:
        return iter([seed])
    return (f"{seed}:{number}" for number in (itertools.count() if count is None else range(count)))


def fuzz(names: Iterator[str], until_s: float, folder: Path, workers: int = SERVERS) -> tuple[int, list[Finding]]:
    """Run cases side by side until they or the time are used up; return how many were run, and what they found."""
    lock = threading.Lock()
    library = build_library(folder)

    def work(world: World) -> tuple[int, list[Finding]]:
        fuzzer, count, found = Fuzzer(world), 0, []
        while time.monotonic() < until_s:
            with lock:
                name = next(names, None)
            if name is None:
                break
            count += 1
            found += fuzzer.run(name)
        return count, found

    with ExitStack() as stack:
        servers = [ForkServer(folder / f"scratch{number}", library) for number in range(workers)]
        for server in servers:
            stack.enter_context(server)
        worlds = [World(folder / f"world{number}", server) for number, server in enumerate(servers)]
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(work, worlds))
    return sum(count for count, _ in results), [finding for _, found in results for finding in found]


def main() -> int:
    """Run from the command line; exit code 1 if anything new was found, or if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10**6)))
    options = parser.parse_args()
    if (reason := missing_tool()) is not None:
        print(f"not run: {reason}", file=sys.stderr)
        return 1
    print(f"SEED={options.seed}, {options.seconds:g} s", flush=True)
    workers = 1 if ":" in options.seed else SERVERS
    with working_folder("fuzz-") as folder:
        count, findings = fuzz(case_names(options.seed), time.monotonic() + options.seconds, folder, workers)
    new = [finding for finding in findings if finding_of(finding.area, str(finding)) is None]
    for finding in new:
        print(str(finding).encode("ascii", "backslashreplace").decode())
    print(f"{count} cases, {len(new)} findings, {len(findings) - len(new)} known; repeat one with `make fuzz SEED=...`")
    return bool(new)


if __name__ == "__main__":
    sys.exit(main())
