"""Values from outside are bounded wherever they are printed, however long a config makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nvfp4_prep._util.text import bounded
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import UsageError
from nvfp4_prep.prepared.problems import Problems
from support.tiny_checkpoints import TinyLayer, config, write

LONG = "A" * 100_000
CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "activation": lambda: config(hidden_act=LONG),
    "activation of escapes": lambda: config(hidden_act="\x1b" * 50_000),
    "number of experts": lambda: config(num_experts=int("9" * 4_000)),
    "algorithm": lambda: config(quantization_config={"quant_method": "modelopt", "quant_algo": LONG}),
    "layers of a mixed config": lambda: config(
        quantization_config={"quant_algo": "MIXED_PRECISION", "quantized_layers": {LONG: {"quant_algo": LONG}}}
    ),
}


def test_what_is_left_out_is_said() -> None:
    assert bounded("abc", 3) == "abc"
    text = bounded("a" * 50 + "b" * 50, 40)
    assert text == "a" * 30 + "… (60 characters left out) …" + "b" * 10


@pytest.mark.parametrize("name", CONFIGS)
def test_long_values_of_a_config(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "source", TinyLayer().tensors(), CONFIGS[name]())
    for arguments in (["convert", source, tmp_path / "out"], ["inspect", source], ["inspect", source, "--json"]):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == (4 if arguments[0] == "convert" else 0)
        assert len(result.stderr) < 2_500
        assert len(result.stdout) < 10_000 or "--json" in arguments


@pytest.mark.parametrize("field", ["what", "where", "expected", "actual", "next_step"])
def test_every_part_of_an_error_is_bounded(field: str) -> None:
    parts = {"what": "x", field: LONG}
    error = UsageError(parts.pop("what"), **parts)
    assert len(str(error)) < 11_000
    assert len(json.dumps(error.to_dict())) < 11_000


def test_every_part_of_a_problem_is_bounded() -> None:
    problems = Problems()
    problems.add(LONG, LONG, LONG, LONG)
    assert len(str(problems.found[0])) < 10_000
