"""Phrases that must not come back where users read: pages, help, messages, model card, report."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from support.command_line import COMMANDS
from support.paths import ROOT

PACKAGES = [ROOT / "converter", ROOT / "kernels"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEMPLATES = sorted(path for package in PACKAGES for path in package.rglob("*.j2"))
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))

INSTEAD = {
    r"(?<!there )\b(?:is|are|was|were) no (?:[a-z]+ )?(?:checkpoint|manifest|repository|directory|file|index|tensor"
    r"|layer|text|number|multiple|object|scale|JSON)s?\b": "is not a …",
    r"\bturn(?:s|ed|ing)? back\b": "inverted, restored",
    r"\bsmoke runs?\b": "smoke test",
    r"\bNOT what it claims": "verification FAILED",
    r"\bnothing on this disk\b": "not a local path",
    r"\bgone through\b": "checked, read",
    r"\band the like\b": "name them, or 'such as'",
    r"\btakers?\b": "sink, reader",
    r"\bstands? (?:twice|in two)\b": "occurs twice, is in two",
    r"\b(?:nobody|somebody)\b": "name who, or use the passive",
    r"\binterpreter lock\b": "GIL",
    r"\b[Mm]ake room\b": "Free disk space",
    r"\bway of the data\b": "data flow",
    r"\bbad nights\b": "retries",
    r"\bsign(?:s|ed)? (?:it |them )?off\b": "passed, checked: a person approves, a check does not",
    r"\bby themselves on a B200\b": "a B200 server without flags runs …",
    r"\bto run that one\b": "name the kernel",
    r"\bfor the other one\b": "name it",
    r"\btensors' names, on one core\b": "the planning of every tensor",
    r"\bresume or start over\b": "Run the same command again",
    r"\band back again\b": "restore",
    r"\bmaker's word\b": "not checked",
    r"\bKilled at any moment\b": "If it is killed",
    r"\ba private one\b": "private",
    r"\bmade if it does not exist\b": "created if it does not exist",
    r"\bmade files\b": "metadata files",
    r"\bside files\b": "auxiliary files",
    r"\b[Ss]ay what shall\b": "Specify what to",
    r"\b(?:without an?|on an?|on the|no|any|other|another|Blackwell|Hopper) cards?\b": "GPU",
    r"\bcards? of (?:compute|capability)\b": "GPU",
}
SPOKEN_OF = {"CONTRIBUTING.md": {"nobody", "is no"}}
"""Pages that quote a phrase in order to forbid it."""


def complaints(text: str, where: str) -> list[str]:
    """Return one line for each phrase in a text; line breaks count as spaces."""
    flat = re.sub(r"\s+", " ", text)
    return [
        f"{where}: {match.group()!r} in {flat[max(0, match.start() - 40) : match.end() + 30]!r}; write: {instead}"
        for phrase, instead in INSTEAD.items()
        for match in re.finditer(phrase, flat, re.IGNORECASE)
        if match.group() not in SPOKEN_OF.get(where, ())
    ]


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the strings of a module but for its docstrings; of f-strings the fixed text."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped: set[int] = set()
    for node in ast.walk(tree):  # parents come before children
        if isinstance(node, documented):
            skipped |= {id(item.value) for item in node.body if isinstance(item, ast.Expr)}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            skipped |= {id(part) for part in node.values}
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def helps(command: click.Command, name: str) -> str:
    with click.Context(command, info_name=name) as context:
        return command.get_help(context)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages(page: Path) -> None:
    assert complaints(page.read_text(encoding="utf-8"), page.name) == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_report_templates(template: Path) -> None:
    assert complaints(template.read_text(encoding="utf-8"), template.name) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    assert complaints(helps(COMMANDS[name], name), name) == []


def test_messages() -> None:
    """The model card and the progress lines are strings of modules too."""
    found = [
        complaint
        for path in MODULES
        for line, text in strings(ast.parse(path.read_text(encoding="utf-8")))
        for complaint in complaints(text, f"{path.relative_to(ROOT)}:{line}")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "noticed"),
    [
        ("x is no prepared checkpoint", True),
        ("48 experts turned\n  back", True),
        ("the smoke run failed", True),
        ("without a card", True),
        ("is no longer read; the model card", False),
        ("there is no manifest; is no manifest", True),
        ("there is no manifest", False),
        ("expert 3 is not a tensor; smoke test passed", False),
    ],
)
def test_phrases_are_found_across_lines(text: str, noticed: bool) -> None:
    assert bool(complaints(text, "here")) is noticed


def test_strings_are_found_in_parts_and_docstrings_are_not() -> None:
    source = '"""is no manifest"""\ndef f():\n    """turned back"""\n    say(f"the smoke " f"run {1} of {2}")\n'
    assert list(strings(ast.parse(source))) == [(4, "the smoke run … of …")]
