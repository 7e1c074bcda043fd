"""Text from outside as one piece of Markdown text: it shows what it is and makes no structure."""

from __future__ import annotations

import re

from nvfp4_prep._util.printable import printable

__all__ = ["MAX_CHARACTERS", "code_span", "plain_text"]

MAX_CHARACTERS = 1000
"""Longest text that is shown; a card is not the place for more."""

_SPECIAL = re.compile(r"[\\`*\[\]|~$!{}^]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+=-]|^(?P<number>\d+)(?=[.)](?:\s|$))")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_BACKTICKS = re.compile("`+")


def plain_text(value: object) -> str:
    """Return ``value`` so that Markdown and HTML show it as it is, in one line, within a table cell too."""
    text = _SPECIAL.sub(_escaped, _one_line(value))
    return re.sub("[&<>]", lambda found: _HTML[found[0]], text)


def _escaped(found: re.Match[str]) -> str:
    return f"{found[0]}\\" if found["number"] else f"\\{found[0]}"


def code_span(value: object) -> str:
    """Return ``value`` as inline code that ends where it should, within a table cell too."""
    text = _one_line(value).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, _BACKTICKS.findall(text)), default=0))
    space = " " if len(fence) > 1 or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _one_line(value: object) -> str:
    text = str(value).encode(errors="replace").decode()  # a directory's name may be no text
    return printable(text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…")
