"""Prose of README and docs has one form: filled to 120 columns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.paths import ROOT


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wrap_prose", ROOT / "docs" / "site" / "wrap_prose.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRAP = load()
LONG = "word " * 30 + "end"
LINES = "word " * 23 + "word\n" + "word " * 6 + "end"


@pytest.mark.parametrize("page", WRAP.pages(), ids=lambda page: page.name)
def test_pages_are_wrapped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert WRAP.wrapped(text) == text, "run `python docs/site/wrap_prose.py`"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (LONG, LINES),
        ("word\n" * 30 + "end", LINES),
        (f"- {LONG}\n  and\n- two", f"- {'word ' * 22}word\n  {'word ' * 7}end and\n- two"),
        (f"1. a\n   - {LONG}", f"1. a\n   - {'word ' * 22}word\n     {'word ' * 7}end"),
        (f"{'w' * 110} `two words`", f"{'w' * 110}\n`two words`"),
        (f"{'w' * 119} - no item", f"{'w' * 119} -\nno item"),
        (f"{'w' * 119} 1. no item", f"{'w' * 119} 1.\nno item"),
        (f"{'w' * 119} #1 is no heading", f"{'w' * 119} #1\nis no heading"),
    ],
)
def test_prose_is_filled(text: str, wanted: str) -> None:
    assert WRAP.wrapped(text) == wanted
    assert WRAP.wrapped(wanted) == wanted


@pytest.mark.parametrize(
    "text",
    [
        f"```sh\n{LONG}\nshort\nlines\n```",
        f"text\n\n    {LONG}\n    code",
        f"| {LONG} |\n|---|\n| a |",
        f"# {LONG}",
        f"<!-- {LONG} -->",
        f"![{LONG}](a.svg)",
        "a\n\nb\n",
    ],
)
def test_the_rest_stays_as_it_is(text: str) -> None:
    assert WRAP.wrapped(text) == text


def test_a_page_that_is_not_wrapped_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(LONG)
    monkeypatch.setattr(WRAP, "ROOT", tmp_path)
    monkeypatch.setattr(WRAP, "pages", lambda: [page])
    for arguments, code, left in ((["--check"], 1, LONG), ([], 0, LINES), (["--check"], 0, LINES)):
        monkeypatch.setattr(sys, "argv", ["wrap_prose.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            WRAP.main()
        assert ended.value.code == code
        assert page.read_text() == left
    assert capsys.readouterr().out == "page.md\npage.md\n"
