"""The documentation site's own code, and that every page is on it. `make docs` builds it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nvfp4_prep
import nvfp4_prep.errors
from support.command_line import COMMANDS
from support.paths import ROOT

SITE = ROOT / "docs" / "site"
WRITTEN_AT_BUILD = {"api.md", "cli.md"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gather(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SITE))
    yield load("gather_pages")
    sys.modules.pop("notebook_page", None)


def page(text: str) -> str:
    return f"<html><body>{text}</body></html>"


def in_navigation(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from in_navigation(value)


def test_every_page_is_in_the_navigation(gather: ModuleType) -> None:
    config = tomllib.loads((SITE / "zensical.toml").read_text(encoding="utf-8"))
    pages = list(in_navigation(config["project"]["nav"]))
    assert len(pages) == len(set(pages))
    assert set(pages) == set(gather.page_names(ROOT).values()) | WRITTEN_AT_BUILD


def test_requirements_are_pinned() -> None:
    lines = (SITE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in packages)


def test_links_are_rewritten_but_not_in_code(gather: ModuleType) -> None:
    text = "[a](x.md#part) and [b](https://host/x.md) and [c](#here)\n\n```\n[a](x.md)\n```\n"
    made = gather.as_site_markdown(text, lambda target: f"moved/{target}")
    assert made == "[a](moved/x.md#part) and [b](https://host/x.md) and [c](#here)\n\n```\n[a](x.md)\n```\n"


def test_lists_are_set_apart_as_python_markdown_wants_them(gather: ModuleType) -> None:
    text = "Text:\n- one\n  goes on\n- two\n\n1. first\n   - inner\n   - inner\n2. second"
    made = gather.as_site_markdown(text, str)
    assert made == "Text:\n\n- one\n  goes on\n- two\n\n1. first\n    - inner\n    - inner\n2. second"


def test_files_that_pages_link_to_become_pages(gather: ModuleType, tmp_path: Path) -> None:
    tree, pages = tmp_path / "tree", tmp_path / "pages"
    for name, text in {
        "README.md": "[d](docs/a.md#x) [p](docs/pictures/p.svg) [c](code) [m](code/m.py)",
        "docs/a.md": "[r](../README.md)",
        "docs/pictures/p.svg": "<svg/>",
        "code/m.py": "a = '```'\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    pages.mkdir()
    gather.write_pages(tree, pages)
    assert (pages / "index.md").read_text() == (
        "[d](a.md#x) [p](pictures/p.svg) [c](files/code/index.md) [m](files/code/m.py.md)"
    )
    assert (pages / "a.md").read_text() == "[r](index.md)"
    assert "````python\na = '```'\n````" in (pages / "files/code/m.py.md").read_text()
    assert "- [m.py](m.py.md)" in (pages / "files/code/index.md").read_text()
    (tree / "docs" / "a.md").write_text("[gone](gone.md)")
    with pytest.raises(SystemExit, match=r"docs/a.md links to gone.md"):
        gather.write_pages(tree, tmp_path / "pages")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<a href="b.html#here">', None),
        ('<a href="b.html">', None),
        ('<a href="https://host/page">', None),
        ('<img src="data:image/png;base64,AA">', None),
        ('<a href="c.html">', "a.html: c.html leads nowhere"),
        ('<a href="b.html#there">', "a.html: b.html#there leads nowhere"),
        ('<img src="p.svg">', "a.html: p.svg leads nowhere"),
        ('<script src="https://host/x.js"></script>', "a.html: fetches https://host/x.js from another host"),
        ('<link rel="stylesheet" href="//host/x.css">', "a.html: fetches //host/x.css from another host"),
    ],
)
def test_broken_links_and_foreign_assets_are_found(tmp_path: Path, text: str, problem: str | None) -> None:
    (tmp_path / "a.html").write_text(page(text))
    (tmp_path / "b.html").write_text(page('<h2 id="here">Here</h2>'))
    assert load("check_site").problems_of(tmp_path) == ([] if problem is None else [problem])


def test_the_api_page_has_every_public_name() -> None:
    text = load("reference_pages").api_page(ROOT)
    objects = re.findall(r"^::: (.+)$", text, re.MULTILINE)
    assert len(objects) == len(set(objects))
    public = {f"nvfp4_prep.{name}" for name in nvfp4_prep.__all__ if not name.startswith("_")}
    assert public | {f"nvfp4_prep.errors.{name}" for name in nvfp4_prep.errors.__all__} <= set(objects)


def test_notebook_outputs_stand_under_their_cells() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {
            "cell_type": "code",
            "source": ["f()"],
            "outputs": [
                {"output_type": "stream", "text": ["printed\n"]},
                {"output_type": "execute_result", "data": {"image/svg+xml": ["<svg/>"], "text/plain": ["P"]}},
            ],
        },
    ]
    made = load("notebook_page").notebook_as_markdown(json.dumps({"cells": cells}))
    assert made.split("\n\n") == [
        "# Title",
        "```python\nf()\n```",
        "```text\nprinted\n```",
        '<div class="notebook-output">\n<svg/>\n</div>\n',
    ]


@pytest.mark.slow
def test_the_command_line_page_has_every_command() -> None:
    text = load("reference_pages").command_line_page(ROOT)
    assert set(re.findall(r"^## (\S+)$", text, re.MULTILINE)) == set(COMMANDS)
    assert text.count("Usage: nvfp4-prep ") == 1 + len(COMMANDS)
