"""The files that a repository's visitors and its host read: CI, issue forms, citation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import nvfp4_prep
from support.command_line import COMMANDS
from support.paths import ROOT

FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def test_hosted_ci_runs_what_ci_run_does() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    wanted = {line.split("#")[0].strip() for line in re.findall(r"^\s*timed make ([^\n]*)", script, re.MULTILINE)}
    newest = re.findall(r"^newest=(\S+)$", script, re.MULTILINE)
    wanted = {target.replace('"$newest"', newest[0]) for target in wanted}
    jobs = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    targets = set(jobs["make"]["strategy"]["matrix"]["target"])
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "make ${{ matrix.target }}" in commands
    targets |= {command.removeprefix("make ") for command in commands if "matrix" not in command}
    assert targets == wanted


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_the_host_requires(path: Path) -> None:
    form = load(path)
    assert form["name"] and form["description"]
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert all(item["attributes"]["label"] for item in fields)
    names = [item["id"] for item in fields]
    assert len(set(names)) == len(names) > 0
    assert any(item.get("validations", {}).get("required") for item in fields)
    for command in re.findall(r"nvfp4-prep ([a-z]+)", path.read_text(encoding="utf-8")):
        assert command in COMMANDS


def test_there_is_a_form_for_each_kind_of_report() -> None:
    assert {path.stem for path in FORMS} == {"bug", "new_format", "new_server_version"}


def test_the_citation_names_this_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == nvfp4_prep.__version__
    assert citation["license"] == "Apache-2.0"
