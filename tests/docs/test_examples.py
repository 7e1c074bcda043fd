"""The examples run as their docstrings say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_prep import SampleModel, convert, write_sample
from support.checkpoint_files import file_digests
from support.paths import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
ROOTS = os.pathsep.join([str(ROOT / "converter"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])


def run(command: list[str | Path], **environment: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": ROOTS, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "source"
    write_sample(folder, SampleModel(layers=5, experts=2))
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, str]:
    return file_digests(convert(source, source.parent / "whole").path)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with `nvfp4-prep` and an `sbatch` that runs jobs at once, one after the other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvfp4-prep").write_text(f"#!{sys.executable}\nfrom nvfp4_prep.cli import main\nmain()\n")
    (folder / "sbatch").write_text(
        """#!/bin/bash
set -e
echo "$@" >> "$SBATCH_LOG"
while [[ $1 == --* ]]; do
    [[ $1 == --array=1-* ]] && count=${1#--array=1-}
    shift
done
if [[ -n $count ]]; then
    for ((i = 1; i <= count; i++)); do SLURM_ARRAY_TASK_ID=$i bash "$@" >&2; done
else
    bash "$@" >&2
fi
echo 42
"""
    )
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


SCRIPTS = sorted(
    [
        *(path for path in EXAMPLES.glob("*.py") if path.name != "expert_pictures.py"),  # a module of the notebook
        EXAMPLES / "serve_sglang.sh",
        EXAMPLES / "serve_vllm.sh",
        EXAMPLES / "slurm" / "convert.sbatch",
    ]
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_example_explains_itself(script: Path, tmp_path: Path) -> None:
    program = sys.executable if script.suffix == ".py" else "bash"
    text = run([program, script, "--help"])
    assert script.name in text and len(text.splitlines()) > 4
    assert "pip install nvfp4-prep" not in text + script.read_text()  # nothing is published on PyPI
    wrong = subprocess.run(
        [program, script, "a", "b", "c", "d", "--nope"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOTS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2 and wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not list(tmp_path.iterdir())


def test_errors_of_examples_are_one_line(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all my work")
    model = tmp_path / "model" / "source" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_text("a checkpoint of mine")
    for script, arguments, words in (
        ("python_api.py", [source.parent], "is not empty"),
        ("demo.py", [mine], "something else than an earlier demo"),
        ("demo.py", [tmp_path / "model"], "something else than an earlier demo"),
        ("flashinfer_direct.py", [source, "--layer", "1"], "is not a prepared checkpoint (no nvfp4_prep.json)"),
        ("flashinfer_direct.py", [source, "--layer", "1", "--tokens", "0"], "invalid number value"),
    ):
        done = subprocess.run(
            [sys.executable, EXAMPLES / script, *arguments],
            env={**os.environ, "PYTHONPATH": ROOTS},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert words in done.stderr and "Traceback" not in done.stderr
    assert (mine / "thesis.txt").read_text() == "all my work"
    assert model.read_text() == "a checkpoint of mine"


def test_slurm_array_and_join(source: Path, whole: dict[str, str], programs: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run(
        ["bash", EXAMPLES / "slurm" / "convert.sbatch"],
        SOURCE=str(source),
        OUT=str(out),
        PARTS="3",
        CONVERT_OPTIONS="--threads 2 --quiet",
        PATH=f"{programs}:{os.environ['PATH']}",
        SBATCH_LOG=str(log),
    )
    array, join = log.read_text().splitlines()
    assert array.startswith("--parsable --array=1-3 ")
    assert join.startswith("--dependency=afterok:42 ")
    assert file_digests(out) == whole


def test_python_api(tmp_path: Path) -> None:
    text = run([sys.executable, EXAMPLES / "python_api.py", tmp_path])
    assert "['can be prepared', 'can be prepared']" in text
    assert "TargetError, exit code 8: Give a target outside the source" in text
    assert "tensors restored" in text
    assert "w13_weight: [4, 256, 128]" in text


def test_ray(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    script = EXAMPLES / "convert_with_ray.py"
    text = run([sys.executable, script, source, out, "--layers-per-task", "2", "--cpus-per-task", "1"])
    assert "4 MoE layers in 2 parts" in text
    assert "verified (full with source)" in text
    assert file_digests(out) == whole
