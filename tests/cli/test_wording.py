"""Lines whose words must fit the command and the state that they speak of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep import convert
from nvfp4_prep.cli import cli
from nvfp4_prep.commands.doctor import diagnose


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def prepared(sample_source: Path, tmp_path: Path) -> Path:
    return convert(sample_source, tmp_path / "prepared", smoke=None).path


def test_restamp_without_edits_has_nothing_to_record(prepared: Path) -> None:
    assert "has no edits, formatting aside; nothing to record" in run("restamp", prepared).stdout
    config = json.loads((prepared / "config.json").read_text())
    (prepared / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    assert "in eos_token_id; recorded in nvfp4_prep.json" in run("restamp", prepared).stdout
    assert "in eos_token_id; recorded before in nvfp4_prep.json" in run("restamp", prepared).stdout


def test_relayout_advises_itself(sample_source: Path, prepared: Path, tmp_path: Path) -> None:
    made = run("convert", sample_source, tmp_path / "out", "--no-smoke", "-q").stdout
    again = run("relayout", prepared, tmp_path / "again", "--gate-up-block", 16, "-q").stdout
    advice = [line for line in made.splitlines() if "convert with --moe-tp" in line]
    assert advice
    assert [line.replace("convert with", "relayout with") for line in advice] == [
        line for line in again.splitlines() if "--moe-tp" in line and line.startswith("cannot serve")
    ]


def test_a_diagnosis_has_a_short_repr() -> None:
    assert len(repr(diagnose())) < 120
