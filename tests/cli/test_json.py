"""``--json``: one object on one line from every command, in one frame, with the keys that docs/json.md names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import nvfp4_prep
from nvfp4_prep.cli import cli
from nvfp4_prep.cli.frame import SCHEMA_VERSION
from support.command_line import COMMANDS
from support.paths import ROOT

FRAME = {"schema_version", "tool_version", "command", "elapsed_s"}
PAGE = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")

CASES = {
    "bench-load": "bench-load PREPARED --from cache --device cpu --repeats 1",
    "convert": "convert SOURCE new --no-smoke",
    "convert --dry-run": "convert SOURCE new --dry-run",
    "convert --layers": "convert SOURCE new --layers 1-1",
    "doctor": "doctor",
    "inspect": "inspect PREPARED",
    "push --dry-run": "push PREPARED a/b --dry-run",
    "relayout": "relayout PREPARED new --gate-up-block 16",
    "restamp": "restamp COPY",
    "restore": "restore PREPARED new",
    "sample": "sample new",
    "verify": "verify PREPARED --quick",
    "verify --smoke": "verify PREPARED --quick --smoke --sample 1",
}
NOT_RUN = {"push": "needs a Hub: tests/hub/test_hub_cli.py"}


def documented(row: str) -> set[str]:
    (cells,) = re.findall(rf"^\| `{re.escape(row)}` \| ([^|]*) \|", PAGE, re.MULTILINE)
    keys = {*re.findall(r"`(\w+)`", cells)}
    return keys | documented(row.split(" ")[0]) if cells.startswith("the same and") else keys


def run(line: str, names: dict[str, Path]) -> tuple[dict[str, Any], int]:
    words = [str(names.get(word, word)) for word in line.split()]
    done = CliRunner().invoke(cli, [*words, "--json"])
    (printed,) = done.stdout.splitlines()
    return json.loads(printed, parse_constant=pytest.fail), done.exit_code


@pytest.fixture
def names(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(sample_prepared, tmp_path / "copy")
    return {"SOURCE": sample_source, "PREPARED": sample_prepared, "COPY": tmp_path / "copy"}


@pytest.mark.slow
@pytest.mark.parametrize("row", CASES)
def test_every_command_prints_the_documented_keys(row: str, names: dict[str, Path]) -> None:
    value, code = run(CASES[row], names)
    assert code == 0, value
    assert {*value} == documented(row) | FRAME
    assert value["schema_version"] == SCHEMA_VERSION == 1
    assert value["tool_version"] == nvfp4_prep.__version__
    assert value["command"] == row.split(" ")[0]
    assert 0 < value["elapsed_s"] < 600


def test_every_command_is_documented_and_run() -> None:
    section = PAGE.split("\n## By command")[1].split("\n## ")[0]
    rows = {*re.findall(r"^\| `([a-z]+[^`]*)` \|", section, re.MULTILINE)}
    assert rows == {*CASES} | {*NOT_RUN}
    with_json = {name for name, command in COMMANDS.items() if any(item.name == "as_json" for item in command.params)}
    assert {row.split(" ")[0] for row in rows} == with_json


@pytest.mark.parametrize(
    ("line", "command"),
    [("verify nowhere", "verify"), ("inspect nowhere", "inspect"), ("verify --nope", None), ("convert", None)],
)
def test_errors_have_the_same_frame(line: str, command: str | None, names: dict[str, Path]) -> None:
    value, code = run(line, names)
    (keys,) = re.findall(r"^(`error` .*)$", PAGE, re.MULTILINE)
    assert {*value} == {*re.findall(r"`(\w+)`", keys)} | FRAME
    assert value["exit_code"] == code != 0 and value["command"] == command
