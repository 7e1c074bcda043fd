"""The serving examples as far as they run without a Blackwell card: commands, comparison, the direct call."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nvfp4_prep
from data.synthetic_layers import SyntheticLayer
from data.synthetic_torch import to_torch
from nvfp4_prep import ConvertOptions, LayoutName, convert
from support.paths import ROOT
from support.tiny_checkpoints import write

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gsm8k() -> ModuleType:
    return load("gsm8k")


def test_only_the_source_needs_a_backend_flag(gsm8k: ModuleType) -> None:
    extra = ["--tensor-parallel-size", "8"]
    source = gsm8k.serve_command("vllm serve", "s", 1, extra, backend="flashinfer_cutedsl")
    prepared = gsm8k.serve_command("vllm serve", "p", 1, extra, backend=None)
    assert source == ["vllm", "serve", "s", "--port", "1", "--moe-backend", "flashinfer_cutedsl", *extra]
    assert prepared == ["vllm", "serve", "p", "--port", "1", *extra]


def test_dry_run_prints_both_servers_and_both_evaluations(
    gsm8k: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gsm8k.main(["src", "prep", "--dry-run", "--limit", "50", "--", "--enable-expert-parallel"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all("--enable-expert-parallel" in line for line in lines[::2])
    assert all("--tasks gsm8k --num_fewshot 5" in line and "--limit 50" in line for line in lines[1::2])
    assert all("num_concurrent=64" in line for line in lines[1::2])


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        (LayoutName.CUTEDSL, "flashinfer_cutedsl"),
        (LayoutName.TRTLLM, "flashinfer_trtllm"),
    ],
)
def test_the_source_is_served_by_the_kernel_of_the_prepared_layout(
    gsm8k: ModuleType, sample_source: Path, tmp_path: Path, layout: LayoutName, backend: str
) -> None:
    convert(sample_source, tmp_path / "out", ConvertOptions(layout=layout))
    assert gsm8k.backend_of(tmp_path / "out") == backend
    assert gsm8k.backend_of(Path("ORG/NAME-on-the-hub")) == "flashinfer_cutedsl"


def test_another_task_and_other_servers(gsm8k: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", "addition", "--include-path", "tasks", "--shots", "3", "--concurrency", "1"]
    servers = ["--serve", "python -m server --model", "--serve-source", "other --model", "--output", "kept"]
    assert gsm8k.main(["src", "prep", "--dry-run", *task, *servers]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("$ other --model src --port")
    assert lines[2].startswith("$ python -m server --model prep --port")
    assert all("--tasks addition --num_fewshot 3" in line and "num_concurrent=1," in line for line in lines[1::2])
    assert all("--include_path tasks" in line for line in lines[1::2])
    assert ["--output_path kept/source" in lines[1], "--output_path kept/prepared" in lines[3]] == [True, True]


@pytest.mark.parametrize(
    ("prepared", "good"), [(0.95, True), (0.945, True), (0.931, True), (0.929, False), (0.0, False), (0.99, False)]
)
def test_verdict(gsm8k: ModuleType, prepared: float, good: bool) -> None:
    source = gsm8k.Score(0.95, 0.006, {0: "18", 1: "3", 2: "70000"})
    ok, text = gsm8k.verdict(source, gsm8k.Score(prepared, 0.006, {0: "18", 1: "4"}), 0.02)
    assert ok is good
    assert f"{prepared:.4f}" in text
    assert ("MORE THAN" in text) is not good
    assert text.endswith("2 of 3 answers differ")


def write_results(folder: Path, age: int, score: float, answers: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    result = {"exact_match,strict-match": score, "exact_match_stderr,strict-match": 0.01}
    results, samples = folder / f"results_{age}.json", folder / f"samples_gsm8k_{age}.jsonl"
    results.write_text(json.dumps({"results": {"gsm8k": result}}))
    lines = [
        {"doc_id": number, "filter": name, "filtered_resps": [answer if name == "strict-match" else "other"]}
        for name in ("strict-match", "flexible-extract")
        for number, answer in enumerate(answers)
    ]
    samples.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for path in (results, samples):
        os.utime(path, (1e9 - age, 1e9 - age))


def test_scores_are_read_from_lm_evals_newest_file(gsm8k: ModuleType, tmp_path: Path) -> None:
    write_results(tmp_path / "model", 100, 0.5, ["1", "2"])
    write_results(tmp_path / "model", 0, 0.9, ["3", "4"])
    assert gsm8k.read_score(tmp_path, "gsm8k") == gsm8k.Score(0.9, 0.01, {0: "3", 1: "4"})
    with pytest.raises(RuntimeError, match=r"left no results\*.json"):
        gsm8k.read_score(tmp_path / "nothing", "gsm8k")


def test_a_server_that_ends_is_an_error(gsm8k: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="exit code 3"), gsm8k.server([sys.executable, "-c", "exit(3)"], 1, 30):
        pass


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("tp", "--tensor-parallel-size 4"),
        ("ep", "--tensor-parallel-size 4 --enable-expert-parallel"),
        ("dep", "--data-parallel-size 4 --enable-expert-parallel"),
    ],
)
def test_serve_script(mode: str, flags: str) -> None:
    script, environment = str(EXAMPLES / "serve_vllm.sh"), {**os.environ, "DRY_RUN": "1"}
    done = subprocess.run(
        ["bash", script, "ckpt", mode, "4"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr.strip() == f"vllm serve ckpt {flags}"
    wrong = subprocess.run(
        ["bash", script, "ckpt", "pp", "4"], capture_output=True, text=True, env=environment, check=False
    )
    assert wrong.returncode == 2


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("tp", "--tp 4"),
        ("ep", "--tp 4 --ep 4"),
        ("dep", "--tp 4 --ep 4 --dp 4 --enable-dp-attention"),
    ],
)
def test_serve_script_for_sglang(mode: str, flags: str) -> None:
    script, environment = str(EXAMPLES / "serve_sglang.sh"), {**os.environ, "DRY_RUN": "1", "FAST": "1"}
    done = subprocess.run(
        ["bash", script, "ckpt", mode, "4"], capture_output=True, text=True, env=environment, check=True
    )
    command = f"python -m sglang.launch_server --model-path ckpt {flags}"
    assert done.stderr.strip() == f"{command} --load-format nvfp4_prep"
    wrong = subprocess.run(
        ["bash", script, "ckpt", "pp", "4"], capture_output=True, text=True, env=environment, check=False
    )
    assert wrong.returncode == 2


@pytest.mark.parametrize("script", ["serve_vllm.sh", "serve_sglang.sh"])
def test_serve_scripts_trust_no_code_unless_they_are_told(script: str, tmp_path: Path) -> None:
    """A checkpoint with code of its own is named; what the user appends goes to the server as it is."""

    def said(*options: str) -> list[str]:
        command = ["bash", str(EXAMPLES / script), str(tmp_path), "tp", "4", *options]
        environment = {**os.environ, "DRY_RUN": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stderr.splitlines()

    (tmp_path / "config.json").write_text("{}")
    (command,) = said()
    assert "trust-remote-code" not in command
    (tmp_path / "tokenizer_config.json").write_text('{\n  "auto_map": {}\n}')
    note, again = said()
    assert note.startswith("note: tokenizer_config.json names Python code in ") and again == command
    (trusting,) = said("--trust-remote-code", "--chat-template", "a b")
    assert trusting == command + " --trust-remote-code --chat-template a\\ b"


def write_source(directory: Path, layer: SyntheticLayer) -> Path:
    return write(directory, {f"model.layers.3.mlp.experts.{name}": to_torch(made) for name, made in layer.tensors()})


def test_flashinfer_direct_leaves_nothing_out() -> None:
    direct, called = load("flashinfer_direct"), []

    def kernel(x: int, top_k: int) -> None:
        called.append((x, top_k))

    direct.call_kernel("0.6.4", kernel, {"x": 1, "top_k": 2})
    with pytest.raises(RuntimeError, match=r"FlashInfer 0\.6\.4 .*no parameter situ_beta.*pip install"):
        direct.call_kernel("0.6.4", kernel, {"x": 1, "top_k": 2, "situ_beta": 1.0})
    assert called == [(1, 2)]


@pytest.mark.parametrize("share", [[], ["--tp", "1/2"], ["--ep", "1/2"]], ids=["whole", "tp", "ep"])
def test_flashinfer_direct_without_the_kernel(tmp_path: Path, share: list[str]) -> None:
    source = write_source(tmp_path / "source", SyntheticLayer(4, 256, 128))
    nvfp4_prep.convert(source, tmp_path / "prepared")
    command = [sys.executable, str(EXAMPLES / "flashinfer_direct.py"), str(tmp_path / "prepared"), "--layer", "3"]
    path = os.pathsep.join(str(EXAMPLES.parent / root) for root in ("converter", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--tokens", "4", *share], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "FlashInfer was not called" in done.stdout
    assert "torch reference: output [4, 256]" in done.stdout
