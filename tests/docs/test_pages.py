"""The documentation and the program say the same."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from nvfp4_prep import SampleModel, errors, write_sample
from nvfp4_prep.cli import cli
from support.cases import slow_after
from support.command_line import COMMANDS
from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = {int(code): names for code, names in re.findall(r"^\| (\d+) \| ([^|]*)\|", text, re.MULTILINE)}
    assert set(rows) == set(errors.EXIT_CODES)
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NvfpPrepError)
    ]
    assert {kind.__name__ for kind in kinds} == set(errors.__all__) - {"EXIT_CODES"}
    for kind in kinds:
        assert f"`{kind.__name__}`" in rows[kind.exit_code]


def test_commands_and_options_that_are_documented_exist() -> None:
    known = {option for command in COMMANDS.values() for item in command.params for option in item.opts}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "\n".join(re.findall(r"^```.*?^```|^    .*$", text, re.MULTILINE | re.DOTALL))
        lines = re.findall(r"^\s*(?:\$ )?nvfp4-prep .*$", blocks, re.MULTILINE) + re.findall("`nvfp4-prep [^`]*`", text)
        for line in lines:
            words = line.strip("`$ \n").split("#")[0].split()
            if words[1].isalpha():
                assert words[1] in COMMANDS, line
            elif words[1].startswith("-"):
                assert words[1] in ("--help", "--version"), line
            for word in words[2:]:
                option = word.strip("`'\"[],.;:)").split("=")[0]
                if re.fullmatch(r"--[a-z][a-z-]+", option):
                    assert option in known | {"--help"}, f"{page.name}: {line}"


def test_manifest_keys_are_documented(sample_prepared: Path) -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    manifest = json.loads((sample_prepared / "nvfp4_prep.json").read_text())
    stamp = json.loads((sample_prepared / "config.json").read_text())["quantization_config"]
    layer = manifest["layers"][0]
    keys: set[str] = {*manifest, *layer, *manifest["options"], *manifest["source"], *stamp, *stamp["layout"]}
    keys |= {*layer["gate_up_scales"], *layer["activation"], *next(iter(manifest["files"].values()))}
    for key in keys:
        assert re.search(rf"`(?:[a-z]+\.)?{key}(?:\[\])?`", text), key


def test_help_is_up_to_date_with_the_exit_codes() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for code, meaning in errors.EXIT_CODES.items():
        assert re.search(rf"^\s+{code}\s+{re.escape(meaning)}$", text, re.MULTILINE)


def test_format_version_of_the_page_is_the_program_s(sample_prepared: Path) -> None:
    manifest: dict[str, Any] = json.loads((sample_prepared / "nvfp4_prep.json").read_text())
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    assert page.startswith(f"# The prepared-checkpoint format, version {manifest['format_version']}\n")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the pages show a machine without a card")
@pytest.mark.parametrize("page", slow_after(1, ["README.md", "docs/first-half-hour.md", "docs/runbook.md"]))
def test_transcripts(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages show what the commands print, figures aside: all of stdout but what a line ``...`` stands for. Lines of
    stderr may be left out (progress)."""
    monkeypatch.chdir(tmp_path)
    demo = SampleModel(layers=3, experts=24, intermediate=256, hidden=512, shard_nbytes=6_000_000)
    write_sample(Path("demo/source"), demo)
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = "".join(re.findall("^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    sessions = re.findall(r"^\$ ([^\n]*)\n((?:(?!\$ )[^\n]*\n)*)", shown, re.MULTILINE)
    assert len(sessions) > 2
    for command, lines in sessions:
        printed, on_stderr, code = _run(command)
        wanted = re.search(r"^\(exit code (\d+)\)\n", lines, re.MULTILINE)
        assert code == (int(wanted[1]) if wanted else 0), printed
        text_shown = re.sub(r"^\(exit code \d+\)\n", "", lines, flags=re.MULTILINE)
        assert not _difference(text_shown, printed, on_stderr), command


@pytest.mark.parametrize(
    ("shown", "agrees"),
    [
        ("a 1\nb\nc\n", True),
        ("a 7\nb\nprogress\nc\n", True),
        ("a 1\n...\n", True),
        ("...\nc\n", True),
        ("a 1\nb\n", False),
        ("a 1\nc\n", False),
        ("b\n...\n", False),
        ("a 1\nc\nb\n", False),
        ("a 1\nb\nc\nd\n", False),
        ("", False),
    ],
)
def test_transcripts_without_a_line_are_noticed(shown: str, agrees: bool) -> None:
    assert (_difference(shown, "a 2\nb\nprogress\nc\n", "progress\n") == "") is agrees


def test_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is typed after `make demo`."""
    monkeypatch.chdir(tmp_path)
    write_sample(Path("demo/source"), SampleModel(layers=2, experts=2))
    (code,) = re.findall("^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert Path("out/config.json").is_file()


def test_nothing_is_said_to_be_on_pypi() -> None:
    for page in PAGES:
        assert "pip install nvfp4-prep" not in page.read_text(encoding="utf-8"), page.name


def _run(command: str) -> tuple[str, str, int]:
    """What a command prints, the part of it that goes to stderr, and the exit code."""
    if command.startswith("nvfp4-prep "):
        result = CliRunner().invoke(cli, command.split()[1:])
        return result.output, result.stderr, result.exit_code
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.stderr, done.returncode


def _difference(shown: str, printed: str, on_stderr: str) -> str:
    """What was printed, if it is not what is shown, otherwise nothing."""
    shown, printed, on_stderr = map(_without_figures, (shown, printed, on_stderr))
    left_out = {*on_stderr.splitlines()} - {*shown.splitlines()}
    lines = "".join(line + "\n" for line in printed.splitlines() if line not in left_out)
    pattern = "".join("(.*\n)*" if line == "..." else re.escape(line + "\n") for line in shown.splitlines())
    return "" if re.fullmatch(pattern, lines) else f"shown:\n{shown}printed:\n{lines}"


def _without_figures(line: str) -> str:
    return re.sub(r"\b[0-9a-f]{64}\b|\d[\d.]*", "#", line)
