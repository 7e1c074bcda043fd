"""Tokens of vLLM's own engine on a GPU, before and after it slept, against the source's experts in the same engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.gpu

BOUND = 0.1
"""As in tests/engine."""


def test_the_engine_gives_the_tokens_of_the_source_before_and_after_sleep(case: Any, tmp_path: Path) -> None:
    program, answer = ROOT / "tests/support/serving/engine_on_gpu.py", tmp_path / "answer.json"
    command = [sys.executable, str(program), case.model.name, str(case.source), str(case.prepared), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    log = done.stdout + done.stderr
    found = json.loads(answer.read_text()) if answer.exists() else {}
    assert done.returncode == 0, f"{sorted(found)}\n{log[-3500:]}"
    expected = found["source"]
    greatest = {key: difference(expected, found[key]) for key in found}
    print(f"\n{case.model.name}, {case.layout.value}: log-probabilities differ by {greatest}")
    for key in ("prepared", "level 1", "level 2"):
        assert [tokens for tokens, _ in found[key]] == [tokens for tokens, _ in expected], key
        assert greatest[key] <= BOUND
    assert found["level 1"] == found["level 2"] == found["prepared"]
    assert [tokens for tokens, _ in found["wrong"]] != [tokens for tokens, _ in expected]
    assert "not for production" in log


def difference(one: list[Any], other: list[Any]) -> float:
    pairs = [pair for (_, mine), (_, theirs) in zip(one, other, strict=True) for pair in zip(mine, theirs, strict=True)]
    return max(abs(mine - theirs) for mine, theirs in pairs)
