"""The example notebook: what it shows is what its cells make."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    return read


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runner() -> ModuleType:
    return load("run_notebook")


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield load("expert_pictures")
    for name in ("expert_pictures", "draw"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.default_smoke
def test_the_stored_outputs_are_what_the_cells_make(runner: ModuleType) -> None:
    """If this fails because outputs changed on purpose: run examples/run_notebook.py."""
    runner.main(["--check"])


def small_notebook(path: Path, source: str) -> None:
    cell = {"cell_type": "code", "id": "only", "source": [source], "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")


def test_a_run_says_what_it_wrote_and_a_check_writes_nothing(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.ipynb"
    monkeypatch.setattr(runner, "NOTEBOOK", small)
    small_notebook(small, "'a'")
    before = small.read_bytes()
    with pytest.raises(SystemExit, match="cells differ from the stored ones: only"):
        runner.main(["--check"])
    assert small.read_bytes() == before
    runner.main([])
    assert "ran 1 code cell" in (said := capsys.readouterr().out) and f"into {small}, of the cells only" in said
    assert json.loads(small.read_text())["cells"][0]["outputs"][0]["data"] == {"text/plain": ["'a'"]}
    written = small.stat()
    runner.main([])
    assert "nothing was written" in capsys.readouterr().out
    runner.main(["--check"])
    assert "the outputs are as stored" in capsys.readouterr().out
    assert small.stat().st_mtime_ns == written.st_mtime_ns


def test_a_cell_that_fails_is_named_and_nothing_is_written(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small.ipynb"
    monkeypatch.setattr(runner, "NOTEBOOK", small)
    small_notebook(small, "1 / 0")
    before = small.read_bytes()
    with pytest.raises(ZeroDivisionError) as raised:
        runner.main([])
    assert raised.value.__notes__ == ["in cell only of small.ipynb; nothing was written"]
    assert small.read_bytes() == before


def test_a_wrong_output_is_noticed(runner: ModuleType, notebook: dict[str, Any]) -> None:
    for cell_id, part in (("scales-picture", "image/svg+xml"), ("verify", "text/plain")):
        changed = json.loads(json.dumps(notebook))
        (cell,) = (cell for cell in changed["cells"] if cell["id"] == cell_id)
        data = cell["outputs"][-1]["data"]
        data[part] = ["another", *data[part]]
        assert runner.different_cells(notebook, changed) == [cell_id]


def test_every_code_cell_was_run_in_order_and_shows_damage_found(notebook: dict[str, Any]) -> None:
    """A notebook without outputs, or one whose verification finds nothing, shows nothing to a reader."""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    text = {cell["id"]: json.dumps(cell["outputs"]) for cell in code}
    assert "bytes differ from what was written" in text["damage"]
    assert "exit code 6" in text["raise"]
    assert "True" in text["repair"]
    assert "80 of 80 tensors are equal" in text["restore"]
    assert "image/svg+xml" in text["rows"] and "image/svg+xml" in text["scales-picture"]


def test_a_cell_shows_what_it_prints_and_its_last_value(runner: ModuleType) -> None:
    names: dict[str, Any] = {}
    stream, result = runner.run_cell("a = 2\nprint('hello')\na + 1", names, 7)
    assert stream["text"] == ["hello\n"]
    assert result["data"] == {"text/plain": ["3"]} and result["execution_count"] == 7
    assert runner.run_cell("a = 3", names, 8) == [] and names["a"] == 3


def test_rows_are_found_by_their_bytes(pictures: ModuleType) -> None:
    gate, up = torch.arange(8).reshape(4, 2), torch.arange(8, 16).reshape(4, 2)
    prepared = torch.stack([up[3], gate[0], gate[1]])
    assert pictures.find_rows(prepared, gate=gate, up=up) == [("up", 3), ("gate", 0), ("gate", 1)]
    with pytest.raises(ValueError, match="not unique"):
        pictures.find_rows(prepared, gate=gate, up=gate)
    with pytest.raises(KeyError):
        pictures.find_rows(prepared + 100, gate=gate, up=up)
