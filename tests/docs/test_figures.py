"""The pages quote what is on file of the benchmarks, every file says where it came from, and the driver runs."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
EARLIER = sorted((BENCHMARKS / "results").glob("earlier/*/*.json"))
NAMES = ("machine", "parts", "quote", "recorded", "run", "values_kernels", "values_loading", "values_scaling")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The driver's and the quoting modules; gone again afterwards, for their names are common words."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(BENCHMARKS))
    for name in NAMES:
        del sys.modules[name]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def changed_pages(bench: SimpleNamespace, part: str, path: tuple[Any, ...], value: Any, folder: Path) -> dict[str, str]:
    """The pages, and the picture, that another value in a file of results would change."""
    shutil.copytree(BENCHMARKS / "results" / "earlier", folder / "earlier")
    for file in RESULTS:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["part"] == part:
            holder = result["figures"]
            for key in path[:-1]:
                holder = holder[key]
            assert holder[path[-1]] != value
            holder[path[-1]] = value
        (folder / file.name).write_text(json.dumps(result), encoding="utf-8")
    recorded = bench.recorded.Recorded(folder)
    pages = {name: bench.quote.quoted(read(name), recorded) for name in bench.quote.PAGES}
    pages[bench.quote.PICTURE] = bench.quote.picture(recorded)
    return {name: text for name, text in pages.items() if text != read(name)}


def test_pages_and_results_agree(bench: SimpleNamespace) -> None:
    assert bench.quote.write_pages(check=True) == [], "run `make figures`"


def test_every_text_is_quoted_once_and_has_values(bench: SimpleNamespace) -> None:
    quoted = [found[1] for page in bench.quote.PAGES for found in bench.quote._MARKED.findall(read(page))]
    assert sorted(quoted) == sorted(bench.quote.VALUES)
    assert {path.stem for path in bench.quote.TEXTS.glob("*.md")} == set(quoted)
    for page in bench.quote.PAGES:
        assert read(page).count("figures: ") == read(page).count("<!-- /figures -->")


def test_every_part_has_results_and_nothing_else_has(bench: SimpleNamespace) -> None:
    missing = {part.name for part in bench.parts.PARTS} - {path.stem for path in RESULTS}
    assert missing <= {part.name for part in bench.parts.PARTS if part.awaited}
    assert {path.stem for path in RESULTS} <= {part.name for part in bench.parts.PARTS}


@pytest.mark.parametrize("path", [*RESULTS, *EARLIER], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_results_say_where_they_came_from(bench: SimpleNamespace, path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    part = next(part for part in bench.parts.PARTS if part.name == result["part"] == path.stem)
    assert result["command"] == f"python benchmarks/run.py --only {part.name}"
    assert result["program"].startswith(f"python benchmarks/{part.program}")
    assert date(2026, 11, 1) <= date.fromisoformat(result["date"])
    assert result["repetitions"] >= 1
    assert result["machine"]["cpus"] >= 1
    if result["origin"] != "benchmarks/run.py":
        assert result["origin"].startswith("typed from the run of ")
        return
    assert len(result["commit"]) >= 40
    for fact in ("gpu", "driver", "torch", "triton") if "gpu" in part.needs else ("torch",):
        assert result["machine"][fact]
    assert "vllm" not in part.needs or result["machine"]["vllm"]


PROOF, LOADING, README, PICTURE = "docs/gpu-proof.md", "docs/loading.md", "README.md", "docs/pictures/loading.svg"
NOTES, PROOF_NOTES = "docs/loading-notes.md", "docs/gpu-proof-notes.md"
CHANGES: list[tuple[str, tuple[Any, ...], Any, set[str]]] = [
    ("convert", ("copy", "median"), 99.0, {"docs/performance.md"}),
    ("load-host", ("rows", 0, "share_mb"), 99.0, {NOTES}),
    ("load-host", ("rows", 5, "worst_ratio"), 1.5, {NOTES, README}),
    ("slow-storage", ("rows", 0, "median"), 99.0, {LOADING}),
    ("slow-storage", ("rows", 4, "reads"), 99, {LOADING}),
    ("load-ranks", ("rows", 0, "median"), 99.0, {LOADING, NOTES}),
    ("start", ("rows", 0, "total", "median"), 99.0, {README, "docs/start-of-a-server.md"}),
    ("smoke-host", ("mutations", 1, "worst"), 99.0, {PROOF_NOTES}),
    ("compile-flashinfer", ("rows", 0, "new_cubin_nbytes"), [99], {PROOF_NOTES}),
    ("prepare-kernels", ("rows", "vLLM's preparation", "ms"), [9.0, 99.0, 999.0], {PROOF, README}),
    ("prepare-kernels-layer", ("rows", "prepare: what has to move", "ms"), [9.0, 99.0, 999.0], {PROOF}),
    ("smoke", ("layer", "lowest_cosine"), 0.5, {PROOF}),
    ("load", ("sides", 0, "median"), 99.0, {LOADING, PICTURE}),
    ("load", ("shares", 1, "median"), 99.0, {NOTES}),
    *(("load", ("shares", row, "median"), 99.0, {NOTES, README}) for row in (0, 2, 3, 4)),
    ("load-vllm", ("rows", 0, "total", "median"), 99.0, {LOADING, README, PICTURE}),
]


@pytest.mark.parametrize(("part", "path", "value", "pages"), CHANGES)
def test_another_result_changes_the_text(
    bench: SimpleNamespace, tmp_path: Path, part: str, path: tuple[Any, ...], value: Any, pages: set[str]
) -> None:
    assert set(changed_pages(bench, part, path, value, tmp_path)) == pages


def test_aims_are_judged_by_all_runs(bench: SimpleNamespace, tmp_path: Path) -> None:
    judged = bench.values_loading.judged
    assert judged([True, True], "7") == "7"
    assert judged([False, False], "7") == "**missed**: 7"
    assert judged([True, False, True], "7") == "**missed in 1 of 3 runs**: 7"
    pages = changed_pages(bench, "load-vllm", ("rows", 2, "times_the_first"), 7.0, tmp_path)
    row = next(line for line in pages[NOTES].splitlines() if "vLLM's own load and preparation" in line)
    assert "**missed" in row
    assert ": 7.0" in row


def scaling_row(cores: int, command: str, side: str, seconds: float) -> dict[str, Any]:
    spread = {"min": seconds, "median": seconds, "max": seconds, "seconds": [seconds]}
    known = {"set": "layer", "cores": cores, "command": command, "side": side}
    return {
        **known,
        "seconds": spread,
        "total": spread,
        "gb_per_s": 8 / seconds,
        "peak_nbytes": 0 if side == "cp" else 700_000_000,
    }


def test_scaling_is_told_as_measured_and_awaited_until_then(bench: SimpleNamespace, tmp_path: Path) -> None:
    values = bench.values_scaling.VALUES["scaling"]
    assert "No run is on file" in values(bench.recorded.Recorded(tmp_path))["text"]
    rows = [scaling_row(2, "convert", "before", 8.0), scaling_row(2, "convert", "now", 4.0)]
    rows += [scaling_row(16, "convert", "now", 0.5), scaling_row(2, "cp -r", "cp", 2.0)]
    rows.append({"set": "layer", "cores": 16, "command": "verify", "side": "now", "failed": "no memory"})
    figures = {
        "repetitions": 1,
        "complete": False,
        "before": "0123456789abcdef",
        "cores": [2, 16],
        "rates": {"sha256_per_s": 2e9, "memcpy_per_s": 1.5e10},
        "sets": [{"name": "layer", "about": "one layer", "nbytes": 8_000_000_000, "expert_tensors": 4608}],
        "rows": rows,
    }
    machine = {"cpus": 16, "gpu": None, "torch": "2", "python": "3.12"}
    result = {"machine": machine, "date": "2026-11-26", "commit": "f" * 40, "command": "make", "repetitions": 1}
    (tmp_path / "scaling.json").write_text(json.dumps({**result, "seconds": 1, "figures": figures}))
    text = values(bench.recorded.Recorded(tmp_path))["text"]
    assert "| convert, before" not in text
    assert "| convert | 4.00 s, 2.0 | 0.50 s, 16.0 | 0.7 |" in text
    assert "| `cp -r` | 2.00 s, 4.0 | | |" in text
    assert "| verify | | failed | |" in text
    assert "2.0 GB/s" in text
    assert "15.0 GB/s" in text


def options(tmp_path: Path, **others: Any) -> argparse.Namespace:
    settings = {"only": None, "work": tmp_path, "memory": tmp_path, "small": True, "limit": None, "results": tmp_path}
    settings["extra"] = ""
    return argparse.Namespace(**{**settings, **others})


def test_what_cannot_run_is_named_with_the_reason(bench: SimpleNamespace, tmp_path: Path) -> None:
    facts = {"gpu": None}
    reasons = {part.name: bench.run.obstacle(part, options(tmp_path), facts) for part in bench.parts.PARTS}
    assert {name for name, reason in reasons.items() if reason == "no CUDA GPU"} == {
        "prepare-kernels",
        "prepare-kernels-layer",
        "trtllm-kernels",
        "load-ranks",
        "relayout-load",
        "smoke",
        "load",
        "load-vllm",
        "start",
    }
    assert not reasons["convert"]
    huge = bench.parts.Part("huge", "", "", (), (), work_gb=1e9)
    assert "1e+09 are needed" in bench.run.obstacle(huge, options(tmp_path, small=False), facts)
    strange = bench.parts.Part("strange", "", "", (), (), needs=("no_such_package",))
    assert bench.run.obstacle(strange, options(tmp_path), facts) == "no_such_package is not installed"


@pytest.mark.parametrize(
    ("arguments", "limit", "reason"), [(("--no-such-option",), 60, "exit code 2"), ((), 0.01, "not done after 0.01 s")]
)
def test_a_part_that_fails_leaves_earlier_results(
    bench: SimpleNamespace, tmp_path: Path, arguments: tuple[str, ...], limit: float, reason: str
) -> None:
    (tmp_path / "broken.json").write_text("earlier")
    part = bench.parts.Part("broken", "", "bench_compile_flashinfer.py", arguments, arguments)
    outcome = bench.run.attempt(part, options(tmp_path, limit=limit), {"gpu": None}, {})
    assert (outcome.state, outcome.reason) == ("failed", reason)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]
    assert (tmp_path / "broken.json").read_text() == "earlier"


@pytest.mark.slow
def test_driver_runs_in_small(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--small", "--only", "convert", "load-host"]
    command += ["--work", str(tmp_path), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(written) == {"convert", "load-host"}
    assert written["convert"]["figures"]["convert"]["median"] > 0
    rows = written["load-host"]["figures"]["rows"]
    assert {row["worst_ratio"] for row in rows if row["tp"] == 1} == {1.0}
    for row in rows:  # whole rows of w2, a third of an expert, instead of 1 / tp of them
        assert 1.0 <= row["worst_ratio"] <= (2 / row["tp"] + 1) / (3 / row["tp"])
    assert written["convert"]["command"].endswith("--only convert --small")
    assert list(tmp_path.iterdir()) == [tmp_path / "results"]
    for part in ("smoke", "load-vllm"):
        assert f"== {part}: not asked for" in done.stdout
