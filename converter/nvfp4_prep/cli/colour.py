"""Colour for the words that decide, where stdout or stderr is a terminal and ``NO_COLOR`` is unset."""

from __future__ import annotations

import os
import re
from typing import TextIO

import click

__all__ = ["coloured", "wants_colour"]

_BAD = re.compile(r"^(?:WRONG|error:|NO )|\bFAILED\b", re.MULTILINE)
_GOOD = re.compile(r"^yes |(?<=: )verified\b|\bsmoke test passed\b", re.MULTILINE)
_WARNING = re.compile(r"^(?:warning:|note |inconclusive)|\bsmoke test inconclusive\b", re.MULTILINE)
_STYLES = ((_BAD, "red"), (_GOOD, "green"), (_WARNING, "yellow"))


def wants_colour(stream: TextIO) -> bool:
    """Return whether a stream is a terminal of somebody who has not declined colour (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def coloured(text: str) -> str:
    """Return a printed text with the words for success, failure and warnings in green, red and yellow."""
    for pattern, colour in _STYLES:
        text = pattern.sub(lambda found, colour=colour: click.style(found[0], fg=colour, bold=True), text)  # type: ignore[misc]
    return text
