"""The group of commands: imported one by one, and completed by shells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

from nvfp4_prep.cli import cli
from nvfp4_prep.cli.options import EnumChoice
from nvfp4_prep.options import ConvertOptions, GateUpPolicy, LayoutName
from support.command_line import COMMANDS

HEAVY = ("torch", "safetensors", "huggingface_hub", "triton", "flashinfer", "jinja2")


@pytest.fixture(scope="module")
def imported_by_help() -> dict[str, list[str]]:
    """By command, in the order of one process that prints the help of each: the modules that are there afterwards."""
    code = (
        "import sys, json\n"
        "from nvfp4_prep.cli.commands import cli\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    try: cli([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "    print('MODULES', json.dumps([name, sorted(sys.modules)]))\n"
    )
    arguments = [sys.executable, "-c", code, json.dumps(["restamp", *(set(COMMANDS) - {"restamp"})])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    lines = [line.removeprefix("MODULES ") for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_imports_nothing_heavy(name: str, imported_by_help: dict[str, list[str]]) -> None:
    assert [module for module in imported_by_help[name] if module in HEAVY] == []


def test_a_command_imports_no_other_command(imported_by_help: dict[str, list[str]]) -> None:
    modules = imported_by_help["restamp"]  # the first one
    assert [name for name in COMMANDS if f"nvfp4_prep.cli.{name}" in modules] == ["restamp"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_its_name(name: str) -> None:
    assert COMMANDS[name].name == name


def complete(words: str, folder: Path) -> list[str]:
    """Return the values that bash is given, as the installed completion script asks for them."""
    environment = {**os.environ, "_NVFP4_PREP_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    code = "from nvfp4_prep.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nvfp4-prep conv", ["plain,convert"]),
        ("nvfp4-prep convert --gate-up-s", ["plain,--gate-up-scales"]),
        ("nvfp4-prep convert --layout cutedsl-", ["plain,cutedsl-batched"]),
        ("nvfp4-prep convert --gate-up-block 1", ["plain,16"]),
        ("nvfp4-prep convert sour", ["dir,sour"]),
        ("nvfp4-prep verify ou", ["dir,ou"]),
        ("nvfp4-prep verify out --source sour", ["dir,sour"]),
        ("nvfp4-prep restore out ba", ["dir,ba"]),
    ],
)
def test_completion(words: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    completion = BashComplete(cli, {}, "nvfp4-prep", "_NVFP4_PREP_COMPLETE")
    assert completion.complete().split() == expected


def test_completion_by_the_program(tmp_path: Path) -> None:
    assert complete("nvfp4-prep restore out ba", tmp_path) == ["dir,ba"]


def test_completion_script_names_the_program() -> None:
    assert "_NVFP4_PREP_COMPLETE" in BashComplete(cli, {}, "nvfp4-prep", "_NVFP4_PREP_COMPLETE").source()


@pytest.mark.parametrize("kind", [LayoutName, GateUpPolicy])
def test_an_enum_is_chosen_by_value(kind: type[LayoutName] | type[GateUpPolicy]) -> None:
    @click.command()
    @click.option("--value", type=EnumChoice(kind))
    def command(value: object) -> None:
        assert isinstance(value, kind)
        click.echo(value)

    for member in kind:
        with pytest.raises(SystemExit) as end:
            command(["--value", member.value])
        assert end.value.code == 0
    with pytest.raises(click.BadParameter):
        EnumChoice(kind).convert(next(iter(kind)).name, None, None)


def test_defaults_of_the_help_are_the_librarys() -> None:
    pytest.importorskip("torch")
    defaults = {item.name: item.default for item in COMMANDS["convert"].params}
    options = ConvertOptions()
    for name in ("layout", "gate_up_block", "gate_up_scales", "moe_tp"):
        assert defaults[name] == getattr(options, name)
