"""Compare everything that two revisions write and print, over all small checkpoints that the tests know.

    python benchmarks/house_outputs.py                     # c64e05e, the oldest with today's format, against HEAD
    python benchmarks/house_outputs.py c64e05e main WORK   # and main against the working tree: the words must be equal

The checkpoints: those of public quantizers in ``tests/data/checkpoints`` and in ``--checkpoints``, samples, and every
directory that a test wrote with ``support.tiny_checkpoints.write`` while the tests of ``GENERATING`` ran, equal ones
once. All commands are run for the first two kinds, and for the third, which are a few hundred, conversion without smoke
test and restoring; what has not begun after ``--minutes`` is left out, and the printed number says so. Each revision is
unpacked by ``git archive``; one process a revision imports it and runs every command in a child of its own. The last
revision is compared with each of the others. Prints Markdown; the exit status is 1 if a byte of a tensor file that both
made, or a sha256 that both manifests have of a source tensor, differs.

Exit codes that differ are listed with the new revision's words: later revisions refuse more. Of the manifest all keys
are compared, and those that differ are named. Of the words, times, rates and the estimate of the time are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from house import CHECKPOINTS, ROOT, SAMPLES, difference, digests, python, unpack

COMMANDS = (
    ("inspect", ["inspect", "{source}", "--json"]),
    ("dry run", ["convert", "{source}", "unused", "--dry-run"]),
    ("convert", ["convert", "{source}", "prepared"]),
    ("verify", ["verify", "prepared", "--source", "{source}"]),
    ("restore", ["restore", "prepared", "restored"]),
    ("relayout", ["relayout", "prepared", "relayout", "--gate-up-block", "32"]),
    ("convert, tp 2", ["convert", "{source}", "tp2", "--moe-tp", "2", "--gate-up-scales", "vllm"]),
)
OF_TESTS = ("convert", "restore")
"""Commands for the checkpoints that tests wrote."""
GENERATING = (
    "moe",
    "formats",
    "planning",
    "checkpoint",
    "commands/test_relayout.py",
    "commands/test_convert_trtllm.py",
)
RECORDER = """
import hashlib, os, shutil
from pathlib import Path

def pytest_collection(session):
    from support import tiny_checkpoints
    write, corpus = tiny_checkpoints.write, Path(os.environ["HOUSE_CORPUS"])

    def recording(folder, *arguments, **options):
        made = write(folder, *arguments, **options)
        digest = hashlib.sha256()
        for path in sorted(Path(made).rglob("*")):
            if path.is_file() and not path.is_symlink():
                digest.update(f"{path.relative_to(made)} {path.stat().st_size}".encode() + path.read_bytes())
        copy = corpus / f"test-{digest.hexdigest()[:12]}"
        if not copy.exists():
            shutil.copytree(made, copy, symlinks=True)
        return made

    tiny_checkpoints.write = recording
"""
RUNNER = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
import torch, nvfp4_prep, nvfp4_prep.cli
jobs = json.load(open(sys.argv[1]))
codes = []
for job in jobs:
    if time.time() > float(sys.argv[2]):
        break
    folder = job["folder"]
    os.makedirs(folder, exist_ok=True)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        out = os.open(job["log"] + ".out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        err = os.open(job["log"] + ".err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.argv = ["nvfp4-prep", *job["argv"]]
        code = 99
        try:
            code = nvfp4_prep.cli.main() or 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 98
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
json.dump(codes, open(sys.argv[1] + ".codes", "w"))
"""
_FIGURES = re.compile(
    r"\d+(\.\d+)? (s|ms|min|GB/s|MB/s|kB/s)\b|\d+:\d\d(:\d\d)?|\"elapsed_s\": [0-9.]+|^time +at least .*$", re.MULTILINE
)


def record_tests(corpus: Path, work: Path) -> None:
    """Run the tests that write checkpoints, and keep those."""
    (work / "house_recorder.py").write_text(RECORDER)
    paths = [work, ROOT / "converter", ROOT / "kernels", ROOT / "tests"]
    environment = {**os.environ, "HOUSE_CORPUS": str(corpus), "PYTHONPATH": ":".join(map(str, paths))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "house_recorder", "-p", "no:cacheprovider", "-m", "not slow"]
    chosen = [f"tests/{name}" for name in GENERATING]
    done = subprocess.run([*command, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-1000:])


def collect(tree: Path, folders: list[Path], work: Path) -> list[Path]:
    """Return all checkpoints, each once."""
    corpus = work / "corpus"
    corpus.mkdir()
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_dir() and not (corpus / path.name).exists():
                shutil.copytree(path, corpus / path.name)
    for name, arguments in SAMPLES:
        done = python(tree, "-m", "nvfp4_prep", "sample", str(corpus / name), *arguments)
        if done.returncode:
            raise SystemExit(done.stderr)
    record_tests(corpus, work)
    return sorted(corpus.iterdir())


def run_all(trees: list[Path], sources: list[Path], work: Path, until: float) -> list[list[int]]:
    """Run all commands of all revisions over all checkpoints, the revisions side by side; return the exit codes."""
    running = []
    for tree in trees:
        jobs = [
            {"folder": str(work / tree.name / "out" / source.name), "log": f"log-{position}", "argv": arguments}
            for source in sources
            for position, arguments in filled(source)
        ]
        listed = work / f"jobs-{tree.name}.json"
        listed.write_text(json.dumps(jobs))
        environment = {**os.environ, "PYTHONPATH": f"{tree / 'converter'}:{tree / 'kernels'}"}
        command = [sys.executable, "-c", RUNNER, str(listed), str(until)]
        running.append(subprocess.Popen(command, env=environment, cwd=work))
    ended = [process.wait() for process in running]
    if any(ended):
        raise SystemExit("a revision's commands did not run to their end")
    return [json.loads((work / f"jobs-{tree.name}.json.codes").read_text()) for tree in trees]


def filled(source: Path) -> list[tuple[int, list[str]]]:
    """Return the numbers and the arguments of the commands for a checkpoint."""
    from_test = source.name.startswith("test-")
    found = []
    for number, (name, arguments) in enumerate(COMMANDS):
        if not from_test or name in OF_TESTS:
            quick = ["--no-smoke"] if from_test and name == "convert" else []
            found.append((number, [argument.format(source=source) for argument in arguments] + quick))
    return found


def words(path: Path) -> str:
    return _FIGURES.sub("#", path.read_text(encoding="utf-8", errors="replace"))


def source_digests(manifest: Path) -> Any:
    """Return the sha256 of every source tensor, by layer and name, in a manifest of any version of this format."""
    if not manifest.is_file():
        return None
    layers = json.loads(manifest.read_bytes())["layers"]
    return [[(item["head"], item["tail"], item["sha256"]) for item in layer["source_tensors"]] for layer in layers]


def tensor_digests(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if name.endswith(".safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", default=["c64e05e", "HEAD"], help="or WORK for the working tree")
    parser.add_argument("--checkpoints", type=Path, action="append", default=[CHECKPOINTS], help="more small ones")
    parser.add_argument("--minutes", type=float, default=120.0, help="for the commands")
    arguments = parser.parse_args()
    names = arguments.revisions
    with tempfile.TemporaryDirectory(prefix="house-outputs-") as folder:
        work = Path(folder)
        trees = [unpack(name, work / f"tree-{number}") for number, name in enumerate(names)]
        sources = collect(trees[-1], arguments.checkpoints, work)
        codes = run_all(trees, sources, work, time.time() + 60 * arguments.minutes)
        all_sources, done = len(sources), min(map(len, codes))
        while sum(len(filled(source)) for source in sources) > done:
            sources.pop()
        print(f"{len(sources)} of {all_sources} checkpoints, {done} commands a revision.")
        failed = 0
        for number, name in enumerate(names[:-1]):
            print(f"\n## {name} against {names[-1]}\n")
            outs = (trees[number] / "out", trees[-1] / "out")
            failed |= compare(sources, (codes[number], codes[-1]), outs)
        raise SystemExit(failed)


def compare(sources: list[Path], codes: tuple[list[int], list[int]], outs: tuple[Path, Path]) -> int:
    """Print what differs and return the exit status."""
    counts, changed = Counter[str](), dict[str, set[str]]()
    wrong, exits = list[str](), list[str]()
    position = -1
    for source in sources:
        roots = [out / source.name for out in outs]
        for number, _ in filled(source):
            position, name = position + 1, COMMANDS[number][0]
            old, new = codes[0][position], codes[1][position]
            counts["commands"] += 1
            counts["commands that end with 0"] += new == 0
            if old != new:
                said = (roots[1] / f"log-{number}.err").read_text(errors="replace").strip().splitlines() or [""]
                exits.append(f"{source.name}, {name}: {old} -> {new} {said[0][:160]}")
            for stream in ("out", "err"):
                texts = [words(root / f"log-{number}.{stream}") for root in roots]
                counts[f"std{stream} equal"] += texts[0] == texts[1]
                if texts[0] != texts[1]:
                    changed.setdefault(f"words of std{stream}", set()).add(name)
        found = [{n: d for n, d in digests(root).items() if not n.startswith("log-")} for root in roots]
        tensors = [tensor_digests(each) for each in found]
        counts["output files of both"] += len(found[0].keys() & found[1].keys())
        counts["output files equal"] += sum(found[0].get(name) == digest for name, digest in found[1].items())
        counts["tensor files of both"] += len(tensors[0].keys() & tensors[1].keys())
        counts["tensor files equal"] += sum(tensors[0].get(name) == digest for name, digest in tensors[1].items())
        for name in sorted(found[0].keys() | found[1].keys()):
            if found[0].get(name) == found[1].get(name):
                continue
            if name not in found[0] or name not in found[1]:
                counts["output files of one revision alone"] += 1
                continue
            keys = difference(roots[0] / name, roots[1] / name)
            changed.setdefault(f"{name.split('/')[0]}/{Path(name).name}", set()).update(keys)
            if name.endswith(".safetensors"):
                wrong.append(f"{source.name}: {name}")
        for target in ("prepared", "tp2", "relayout"):
            both = [source_digests(root / target / "nvfp4_prep.json") for root in roots]
            if None in both:
                continue
            counts["manifests of both"] += 1
            counts["manifests with the same sha256 of all source tensors"] += both[0] == both[1]
            if both[0] != both[1]:
                wrong.append(f"{source.name}: {target}'s manifest has another sha256 of a source tensor")
    print("| | |\n|---|---:|")
    for name, count in counts.items():
        print(f"| {name} | {count:,} |")
    print("\nWhat differs:\n" if changed else "\nNothing else differs.")
    for name, keys in sorted(changed.items()):
        print(f"- {name}: {', '.join(sorted(keys))}")
    verdict = "DIFFER:" if wrong else "all equal."
    print(f"\nBytes of tensor files and sha256 of source tensors: {verdict}")
    for line in wrong:
        print(f"- {line}")
    print("\nExit codes: " + (f"{len(exits)} differ." if exits else "all equal."))
    for line in exits:
        print(f"- {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
