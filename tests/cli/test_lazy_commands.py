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


def imported_by(*arguments: str) -> list[str]:
    code = (
        "import sys, json\n"
        f"sys.argv = ['nvfp4-prep', *{list(arguments)!r}]\n"
        "from nvfp4_prep.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    assert [module for module in imported_by(name, "--help") if module in HEAVY] == []


def test_a_command_imports_no_other_command() -> None:
    modules = imported_by("restamp", "--help")
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
def test_completion(words: str, expected: list[str], tmp_path: Path) -> None:
    assert complete(words, tmp_path) == expected


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
