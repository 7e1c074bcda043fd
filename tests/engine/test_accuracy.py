"""The accuracy check of examples/gsm8k.py, run: a small trained model, its source and its prepared form, by HTTP.

The model adds numbers, was quantized by ModelOpt, and is asked by lm-eval as GSM8K is: questions with five solved ones
before each, through the completions endpoint. The source is served by `source_server.py`, the prepared checkpoint by
vLLM's own server with the installed plugin and ``NVFP4_PREP_REFERENCE_MOE=1``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nvfp4_prep.commands.convert import convert
from nvfp4_prep.commands.verify import verify
from support.engine.http_server import DTYPE, ONE_THREAD, free_port
from support.paths import ROOT

TASK = "addition"
STEPS = 900
QUESTIONS = 200
FAR_FROM_CHANCE = 0.5
"""Least score of the source; 199 sums are possible, so guessing the likeliest gives 0.01."""
DIFFERING = 2
"""Greatest number of questions of 200 that may have another answer.

One question at a time, one thread, float16 and greedy decoding leave one cause: the same float32 sums in another order,
which moves a logit by 0.005 and so can exchange the first two tokens of a near tie. Seen: 0.
"""
TOLERANCE = DIFFERING / QUESTIONS
PROGRAMS = ROOT / "tests" / "support" / "engine"
SERVE = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model"
SERVE_SOURCE = f"{sys.executable} {PROGRAMS / 'source_server.py'} --model"
SERVER_OPTIONS = ["--enforce-eager", "--max-model-len", "128", "--dtype", DTYPE, "--max-num-seqs", "1"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gsm8k", ROOT / "examples" / "gsm8k.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gsm8k"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Everything offline, no cache outside the test's folder, lm_eval of this environment."""
    return {
        **ONE_THREAD,
        "NVFP4_PREP_REFERENCE_MOE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hugging-face")),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[Path, Path]:
    """The quantized model, and the folder of lm-eval's task."""
    root = tmp_path_factory.mktemp("addition")
    command = [sys.executable, str(PROGRAMS / "train_arithmetic.py"), str(root / "source"), str(root / "task")]
    done = subprocess.run(
        [*command, str(STEPS)], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return root / "source", root / "task"


@dataclass(frozen=True)
class Compared:
    """The example after its run.

    Attributes:
        output: what it printed.
        code: its exit code.
        source: score of the source.
        prepared: score of the prepared checkpoint.
    """

    output: str
    code: int
    source: Any
    prepared: Any


@pytest.fixture(scope="module")
def compared(
    trained: tuple[Path, Path],
    example: ModuleType,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Compared:
    """The example's command line on the source and the prepared checkpoint."""
    source, task = trained
    root = tmp_path_factory.mktemp("compared")
    convert(source, root / "prepared")
    command = [sys.executable, str(ROOT / "examples" / "gsm8k.py"), str(source), str(root / "prepared")]
    command += ["--task", TASK, "--include-path", str(task), "--concurrency", "1", "--port", str(free_port())]
    command += ["--output", str(root / "results"), "--tolerance", str(TOLERANCE), "--timeout", "600"]
    command += ["--serve", SERVE, "--serve-source", SERVE_SOURCE, "--", *SERVER_OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-4000:]
    scores = [example.read_score(root / "results" / name, TASK) for name in ("source", "prepared")]
    return Compared(done.stdout, done.returncode, *scores)


def exchange_gate_and_up(source: Path, directory: Path) -> Path:
    """Write the source with gate under up's name and up under gate's."""
    shutil.copytree(source, directory)
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    tensors = load_file(source / "model.safetensors")
    exchanged = {".".join(names.get(part, part) for part in name.split(".")): value for name, value in tensors.items()}
    assert exchanged.keys() == tensors.keys()
    save_file(exchanged, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_the_prepared_checkpoint_answers_as_its_source(compared: Compared, accuracy_table: list[str]) -> None:
    differing = compared.source.differing(compared.prepared)
    accuracy_table.append(
        f"| prepared | {compared.source.exact:.3f} | {compared.prepared.exact:.3f} | {differing} of {QUESTIONS} |"
    )
    assert len(compared.source.answers) == len(compared.prepared.answers) == QUESTIONS
    assert compared.source.exact >= FAR_FROM_CHANCE
    assert differing <= DIFFERING
    assert compared.code == 0
    assert f"{differing} of {QUESTIONS} answers differ" in compared.output


def test_gate_and_up_exchanged_are_told_apart_by_the_score(
    compared: Compared,
    trained: tuple[Path, Path],
    example: ModuleType,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accuracy_table: list[str],
) -> None:
    """Wrong experts whose digests are right: nothing but the answers can tell."""
    source, task = trained
    convert(exchange_gate_and_up(source, tmp_path / "exchanged"), tmp_path / "wrong")
    assert verify(tmp_path / "wrong").ok
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    port, evaluation = free_port(), example.Evaluation(TASK, concurrency=1, include_path=str(task))
    serve = example.serve_command(SERVE, str(tmp_path / "wrong"), port, SERVER_OPTIONS, backend=None)
    wrong = example.accuracy(serve, evaluation, str(tmp_path / "wrong"), port, 600, tmp_path / "results")
    good, text = example.verdict(compared.source, wrong, TOLERANCE)
    accuracy_table.append(
        f"| gate and up exchanged | {compared.source.exact:.3f} | {wrong.exact:.3f} |"
        f" {compared.source.differing(wrong)} of {QUESTIONS} |"
    )
    assert not good
    assert "MORE THAN" in text
    assert wrong.exact < compared.source.exact - 10 * TOLERANCE
