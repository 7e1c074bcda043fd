"""Groups of options and links in every help, and completion of paths."""

from __future__ import annotations

import re

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from nvfp4_prep.cli import cli
from nvfp4_prep.cli import help as help_module
from nvfp4_prep.cli.help import GROUPS, PAGES, SUMMARIES, learn_more
from support.command_line import COMMANDS
from support.paths import ROOT


def shown(name: str) -> str:
    return CliRunner().invoke(cli, [name, "--help"]).stdout


def sections(text: str) -> dict[str, list[str]]:
    found = re.findall(r"^(\w[^\n:]*):\n((?:  .*\n)+)", text, re.MULTILINE)
    return {title: re.findall(r"^  (?:-\w, )?(--[a-z-]+)", body, re.MULTILINE) for title, body in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_one_group(name: str) -> None:
    grouped = [option for _, names in GROUPS[name] for option in names.split()]
    options = {item.name: item for item in COMMANDS[name].params if isinstance(item, click.Option)}
    assert len({*grouped}) == len(grouped) and {*grouped} <= {*options}
    in_help = [option for group in sections(shown(name)).values() for option in group]
    assert sorted(in_help) == sorted(["--help", *(item.opts[-1] for item in options.values())])
    general = {"report", "as_json", "quiet", "verbose", "log_file"}
    assert {*options} - {*grouped} <= general


def test_the_list_of_commands_has_whole_sentences() -> None:
    assert {*SUMMARIES} == {*COMMANDS}
    text = CliRunner().invoke(cli, ["--help"], terminal_width=80).stdout
    listed = re.findall(r"^  ([a-z-]+)  +([A-Z].*\.)$", text.split("Commands:")[1], re.MULTILINE)
    assert dict(listed) == SUMMARIES


def test_common_options_come_first() -> None:
    groups = sections(shown("convert"))
    assert list(groups)[:2] == ["Arguments", "Common"] and list(groups)[-1] == "Output and log"
    assert groups["Common"] == ["--dry-run", "--layout", "--moe-tp"]
    assert "[default: cutedsl]" in " ".join(shown("convert").split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_is_explained(name: str) -> None:
    command = COMMANDS[name]
    context = click.Context(command)
    arguments = [item.make_metavar(context) for item in command.params if isinstance(item, click.Argument)]
    lines = shown(name).split("Arguments:\n")[1].splitlines() if arguments else []
    assert all(any(re.match(rf"  {re.escape(word)}\s+\w", line) for line in lines) for word in arguments)
    assert bool(arguments) == ("Arguments:" in shown(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_a_page_that_exists(name: str) -> None:
    assert shown(name).rstrip().endswith(f"Learn more: docs/{PAGES[name]}")
    assert (ROOT / "docs" / PAGES[name]).is_file()


def test_an_address_of_the_package_is_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    from email.message import Message

    metadata = Message()
    metadata["Project-URL"] = "Documentation, https://example.org/docs/"
    monkeypatch.setattr(help_module.importlib.metadata, "metadata", lambda name: metadata)
    assert learn_more("hub.md") == "https://example.org/docs/hub/"


def completions(words: list[str], incomplete: str) -> list[tuple[str, str]]:
    complete = ShellComplete(cli, {}, "nvfp4-prep", "_NVFP4_PREP_COMPLETE")
    return [(item.type, item.value) for item in complete.get_completions(words, incomplete)]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["convert"], "dir"),
        (["convert", "source"], "dir"),
        (["verify"], "dir"),
        (["verify", "out", "--source"], "dir"),
        (["restore", "out"], "dir"),
        (["push"], "dir"),
        (["doctor"], "dir"),
        (["sample"], "dir"),
        (["verify", "out", "--report"], "file"),
    ],
)
def test_paths_complete(words: list[str], kind: str) -> None:
    assert completions(words, "ki") == [(kind, "ki")]


def test_commands_options_and_choices_complete() -> None:
    assert ("plain", "convert") in completions([], "con")
    assert ("plain", "--gate-up-scales") in completions(["convert"], "--gate")
    assert [value for _, value in completions(["relayout", "--layout"], "")] == ["cutedsl", "cutedsl-batched", "trtllm"]
