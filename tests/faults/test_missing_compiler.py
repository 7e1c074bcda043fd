"""Without a C compiler: what was asked for by name fails in one line, the short form in ``make test`` skips."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import run as fuzz_run
from support.paths import ROOT

REASON = "the fault library needs a C compiler: install one that is called cc"


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_compiler")
def test_make_fuzz_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz"])
    assert fuzz_run.main() == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"not run: {REASON}") and captured.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True], ids=["make test", "make test-faults"])
@pytest.mark.parametrize("suite", ["test_faults.py", "test_hub_faults.py"])
@pytest.mark.usefixtures("no_compiler")
def test_the_suite(asked: bool, suite: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "NVFP4_PREP_FAULTS"}
    variables |= {"NVFP4_PREP_FAULTS": "all"} if asked else {}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"tests/faults/{suite}"]
    ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert REASON in ran.stdout and "passed" not in ran.stdout
    assert ran.returncode == (1 if asked else 0), ran.stdout
    assert ("not run: " in ran.stdout) == asked
