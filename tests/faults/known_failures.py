"""Failures of the fault suite that are known and not mended yet. Empty when all is well.

A problem that an entry matches makes its test an expected failure; every other problem fails it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """One known failure.

    Attributes:
        finding: its number and a word.
        scenarios: names of the scenarios, or of the fuzz areas.
        text: regular expression that is searched for in the problem's text.
    """

    finding: str
    scenarios: tuple[str, ...]
    text: str


KNOWN_FAILURES: tuple[Known, ...] = ()


def finding_of(scenario: str, text: str) -> str | None:
    """Return the finding that a problem belongs to, or None."""
    for known in KNOWN_FAILURES:
        if scenario in known.scenarios and re.search(known.text, text, re.DOTALL):
            return known.finding
    return None
