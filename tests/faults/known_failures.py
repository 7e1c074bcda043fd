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
        scenario: name of the scenario, or of the fuzz area.
        text: regular expression that is searched for in the problem's text.
    """

    finding: str
    scenario: str
    text: str


_NOT_OURS = r"the same command again: exit code 8: .* exists and is not empty"
KNOWN_FAILURES = tuple(
    Known("finding 6: stopped in the last five steps", scenario, _NOT_OURS)
    for scenario in ("restore", "restore-restart", "relayout")
)


def finding_of(scenario: str, text: str) -> str | None:
    """Return the finding that a problem belongs to, or None."""
    for known in KNOWN_FAILURES:
        if known.scenario == scenario and re.search(known.text, text, re.DOTALL):
            return known.finding
    return None
