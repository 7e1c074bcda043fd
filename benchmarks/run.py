"""All benchmarks: what this machine can run is run, and what the documentation quotes is written.

    make bench                                              # everything that can run here
    python benchmarks/run.py --only load load-vllm --memory /mnt/memory
    python benchmarks/run.py --only scaling --extra '--before /data/older-tree --minutes 9'
    python benchmarks/run.py --small --results /tmp/results  # a try in small: no figures to quote

Each part is one program with a time limit; its figures, with command, date, machine and commit, go into
benchmarks/results/PART.json. A part that fails or cannot run leaves the file of an earlier run as it is and is named
with the reason. At the end the pages are brought up to date (quote.py). Exit code 1 if a part failed.

Aims are judged by all runs on file: what shall count beside a new one is moved to results/earlier/NAME/ first.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from parts import PARTS, Part
from quote import write_pages
from recorded import RESULTS

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Outcome:
    """What became of a part: ``done``, ``failed``, ``cannot run`` or ``not asked for``, and why."""

    state: str
    reason: str = ""


def main() -> None:
    options = parse()
    facts = machine.facts()
    sources = {"commit": options.commit or machine.commit(), "sources_sha256": machine.sources_sha256()}
    print(json.dumps({**facts, **sources}), flush=True)
    outcomes: dict[str, Outcome] = {}
    for part in PARTS:
        outcomes[part.name] = outcome = attempt(part, options, facts, sources)
        print(f"== {part.name}: {outcome.state} {outcome.reason}".rstrip(), flush=True)
    print("\nparts:")
    for part in PARTS:
        outcome = outcomes[part.name]
        print(f"  {part.name:22} {outcome.state:14} {outcome.reason or part.about}")
    if options.results == RESULTS:
        changed = write_pages()
        print(f"pages written: {', '.join(changed) or 'none, they say so already'}")
    sys.exit(any(outcome.state == "failed" for outcome in outcomes.values()))


def attempt(part: Part, options: argparse.Namespace, facts: dict[str, Any], sources: dict[str, str]) -> Outcome:
    """Runs one part if it was asked for and can run here, and keeps its figures."""
    if options.only and part.name not in options.only:
        return Outcome("not asked for")
    if reason := obstacle(part, options, facts):
        return Outcome("cannot run", reason)
    print(f"\n== {part.name}: {part.about}", flush=True)
    wanted = part.small if options.small else part.arguments
    rooms = ["work", *(["memory"] if "{memory}" in wanted else [])]
    folders = {name: Path(tempfile.mkdtemp(prefix=f"bench-{part.name}-", dir=getattr(options, name))) for name in rooms}
    try:
        figures_file = folders["work"] / "figures.json"
        arguments = [text.format(**folders) for text in wanted]
        arguments += shlex.split(options.extra)
        command = [sys.executable, str(HERE / part.program), *arguments, "--json", str(figures_file)]
        limit, begun = options.limit or part.limit_s, time.monotonic()
        failure = run(command, limit)
        seconds = time.monotonic() - begun
        if failure:
            if figures_file.exists():
                print(f"{part.name}: what it had written: {figures_file.read_text()}")
            return Outcome("failed", failure)
        figures = json.loads(figures_file.read_text())
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    keep(part, options, {"seconds": round(seconds, 1), **sources, "machine": facts}, figures)
    return Outcome("done", f"{seconds:.0f} s")


def obstacle(part: Part, options: argparse.Namespace, facts: dict[str, Any]) -> str:
    """Why a part cannot run here; empty if it can."""
    if "gpu" in part.needs and facts["gpu"] is None:
        return "no CUDA GPU"
    for package in part.needs:
        if package != "gpu" and not installed(package):
            return f"{package} is not installed"
    if options.small:
        return ""
    for name, needed in (("work", part.work_gb), ("memory", part.memory_gb)):
        folder = getattr(options, name)
        if needed and not folder.is_dir():
            return f"--{name}: no folder {folder}"
        if needed and (free := shutil.disk_usage(folder).free / 1e9) < needed:
            return f"--{name} {folder} has {free:.1f} GB free, {needed:g} are needed"
    return ""


def installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def run(command: list[str], limit_s: float) -> str:
    """Runs a part in a process group of its own; returns why it failed, or nothing."""
    paths = [ROOT / "converter", ROOT / "kernels", ROOT / "tests"]
    path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        code = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit code {code}" if code else ""


def keep(part: Part, options: argparse.Namespace, facts: dict[str, Any], figures: dict[str, Any]) -> None:
    """Writes the part's file of results, whole or not at all."""
    result = {
        "part": part.name,
        "origin": "benchmarks/run.py",
        "about": part.about,
        "command": shlex.join(["python", "benchmarks/run.py", "--only", part.name, *(["--small"] * options.small)]),
        "program": shlex.join(
            [
                *("python", f"benchmarks/{part.program}", *(part.small if options.small else part.arguments)),
                *shlex.split(options.extra),
            ]
        ),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "repetitions": figures["repetitions"],
        **facts,
        "figures": figures,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / f"{part.name}.json"
    target.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".new").replace(target)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    temporary = Path(tempfile.gettempdir())
    memory = Path("/dev/shm")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART", help="these parts")
    parser.add_argument("--work", type=Path, default=temporary, help=f"folder on a disk (default {temporary})")
    parser.add_argument(
        "--memory",
        type=Path,
        default=memory if memory.is_dir() else temporary,
        help="memory-backed folder (default /dev/shm)",
    )
    parser.add_argument("--small", action="store_true", help="small sizes, few repetitions: does it run?")
    parser.add_argument("--limit", type=float, help="seconds for each part instead of its own limit")
    parser.add_argument("--extra", default="", help="more arguments for the parts' programs, for example '--minutes 9'")
    parser.add_argument("--results", type=Path, help="folder of the results (with --small: build/benchmarks)")
    parser.add_argument("--commit", default="", help="commit of the sources, where the checkout has no git")
    options = parser.parse_args()
    if options.results is None:
        options.results = ROOT / "build" / "benchmarks" if options.small else RESULTS
    return options


if __name__ == "__main__":
    main()
