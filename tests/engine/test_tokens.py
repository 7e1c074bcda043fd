"""Tokens out of a prepared checkpoint, from vLLM's own HTTP server, against the source in the same engine.

The prepared checkpoint: vLLM's OpenAI server, the installed plugin, ``NVFP4_PREP_REFERENCE_MOE=1``. The source:
`source_engine.py`, vLLM's loading and emulation functions. Scheduler, attention, router and sampler are the same code,
so what differs is this project's conversion, loading and fused experts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.options import ConvertOptions, LayoutName
from support.engine.http_server import DTYPE, ONE_THREAD, Completion, Program, Server, serving
from support.engine.whole_models import DEEPSEEK_V3, NEMOTRON_H, QWEN3_MOE, WholeModel
from support.paths import ROOT

PROMPTS = [[5, 6, 7, 8], list(range(10, 31)), [99, 3, 200], [250] * 40]
MAX_TOKENS = 24
BOUND = 0.1
"""Greatest difference of a token's log-probability. Wrong experts: 1.6 and more.

Seen: 0.005 for the gated models. On another machine 0.0547 for DeepSeek-V3, at every run and at older commits, with all
tokens equal: an activation that is rounded to the other FP4 value is seen, and sums depend on the processor's kernels.
On a third machine vLLM's CPU engine does not repeat itself for this model: the source alone, twice with the same
settings, gives 58 and 74 of 96 tokens equal, and the server once answered with HTTP 400. There nothing can be compared.
"""
MODELS = [QWEN3_MOE, DEEPSEEK_V3, NEMOTRON_H]


@dataclass(frozen=True)
class Served:
    """A model, its source, its prepared form behind a server, and what both said."""

    model: WholeModel
    source: Path
    server: Server
    expected: list[Completion]
    prepared: list[Completion]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[Served]:
    model: WholeModel = request.param
    root = tmp_path_factory.mktemp(model.name)
    source = model.write(root / "source")
    if model is DEEPSEEK_V3 and len({str(source_completions(source, root)) for _ in range(2)}) > 1:
        pytest.xfail("vLLM's engine gives other tokens for the same source: see BOUND")
    convert(source, root / "prepared")
    program = Program.VLLM if model.gated else Program.UNGATED
    # At the same time: what takes long is the start of either engine, by one thread.
    with ThreadPoolExecutor() as beside:
        expected = beside.submit(source_completions, source, root)
        with serving(root / "prepared", logs / f"{model.name}.log", program=program) as server:
            completions = server.complete(PROMPTS, MAX_TOKENS)
        yield Served(model, source, server, expected.result(), completions)


def source_completions(source: Path, folder: Path) -> list[Completion]:
    """The source's tokens, in a process of its own."""
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(json.dumps({"prompts": PROMPTS, "max_tokens": MAX_TOKENS}))
    program = ROOT / "tests" / "support" / "engine" / "source_engine.py"
    command = [sys.executable, str(program), str(source), DTYPE, str(request), str(answer)]
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [Completion(**one) for one in json.loads(answer.read_text())]


def difference(one: list[Completion], other: list[Completion]) -> float:
    """Return the greatest difference of log-probabilities."""
    return max(
        abs(mine - theirs)
        for mine_all, theirs_all in zip(one, other, strict=True)
        for mine, theirs in zip(mine_all.logprobs, theirs_all.logprobs, strict=True)
    )


def compare(name: str, what: str, expected: list[Completion], found: list[Completion], table: list[str]) -> None:
    """Add a row to the table; tokens must be equal, log-probabilities within the bound."""
    greatest = difference(expected, found)
    pairs = [
        pair for one, two in zip(expected, found, strict=True) for pair in zip(one.tokens, two.tokens, strict=True)
    ]
    same = sum(one == two for one, two in pairs)
    table.append(f"| {name} | {what} | {same} of {len(pairs)} equal | {greatest:.4f} |")
    assert len(pairs) == len(PROMPTS) * MAX_TOKENS
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert greatest <= BOUND


def test_tokens_and_log_probabilities_are_the_sources(served: Served, table: list[str]) -> None:
    compare(served.model.name, "prepared by HTTP against source", served.expected, served.prepared, table)
    assert len({token for one in served.prepared for token in one.tokens}) > 10  # no constant


def test_a_file_for_trtllm_gen_gives_the_same_tokens(
    served: Served, tmp_path: Path, logs: Path, table: list[str]
) -> None:
    """Rearranged at the start into the layout that the reference code computes."""
    if served.model is not QWEN3_MOE:
        pytest.skip("one model is enough for a layout")
    convert(served.source, tmp_path / "trtllm", ConvertOptions(layout=LayoutName.TRTLLM))
    with serving(tmp_path / "trtllm", logs / "trtllm.log", ["--moe-backend", "flashinfer_cutedsl"]) as server:
        found = server.complete(PROMPTS, MAX_TOKENS)
    compare(served.model.name, "TRTLLM-gen file, rearranged, against source", served.expected, found, table)


def test_two_tensor_parallel_ranks_give_the_sources_tokens(
    served: Served, tmp_path: Path, logs: Path, table: list[str]
) -> None:
    """Against the source on two ranks: their sums are rounded before they are added, so one rank rounds otherwise."""
    if served.model is not QWEN3_MOE:
        pytest.skip("one model is enough for a parallel configuration")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("vLLM binds each rank to a core of its own: two are needed")
    convert(served.source, tmp_path / "prepared")
    options = ["--tensor-parallel-size", "2"]

    def answer(program: Program, directory: Path) -> list[Completion]:
        with serving(directory, logs / f"tp2-{program.name}.log", options, program) as server:
            return server.complete(PROMPTS, MAX_TOKENS)

    with ThreadPoolExecutor() as beside:
        expected = beside.submit(answer, Program.SOURCE, served.source)
        found = answer(Program.VLLM, tmp_path / "prepared")
    compare(served.model.name, "TP2 against source on TP2", expected.result(), found, table)


def test_a_checkpoint_with_wrong_experts_is_told_apart(served: Served, tmp_path: Path, table: list[str]) -> None:
    """The comparison sees wrong experts: gate under up's name, or the rows of up in reverse."""
    if served.model is DEEPSEEK_V3:
        pytest.skip("one gated model and one without gate are enough to see that the comparison can fail")
    wrong = served.model.write(tmp_path / "exchanged", exchanged=True)
    found = source_completions(wrong, tmp_path)
    greatest = difference(found, served.prepared)
    wrong_how = "gate and up exchanged" if served.model.gated else "up's rows in reverse"
    table.append(f"| {served.model.name} | prepared against source with {wrong_how} | differ | {greatest:.4f} |")
    assert greatest > 10 * BOUND
    assert [one.tokens for one in served.prepared] != [one.tokens for one in found]


def test_the_log_says_that_this_is_no_production(served: Served) -> None:
    log = served.server.log.read_text(errors="replace")
    assert "not for production" in log
    assert "NVFP4_PREP_REFERENCE_MOE=1" in log
