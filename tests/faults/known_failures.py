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


_NOT_OURS = r"the same command again: exit code 8: .* exists and is not empty"
_LEFTOVERS = r"found exit code 1: error: .*Input/output error"
_NO_FILE = r"\((unfinished|prepared); (journal\.jsonl|lock|nvfp4_prep\.json) is a "
KNOWN_FAILURES = (
    Known("finding 6: stopped in the last five steps", ("restore", "restore-restart", "relayout"), _NOT_OURS),
    Known("new: EIO while leftovers are removed", ("resume", "restart", "restore-restart", "join"), _LEFTOVERS),
    Known("finding 24: link among leftovers", ("unfinished",), r"Cannot call rmtree on a symbolic link"),
    Known("finding 2: work folder is a link", ("unfinished",), r"\(unfinished; \.nvfp4_prep is a link"),
    Known("findings 2, 16, 17: journal, lock or manifest is no file", ("unfinished", "prepared"), _NO_FILE),
    Known("finding 22: journal of wrong types", ("unfinished",), r"\(unfinished; journal\)"),
    Known(
        "new: --restart and a folder in the place of a file", ("unfinished",), r"exit code 1: error: .*Is a directory"
    ),
)


def finding_of(scenario: str, text: str) -> str | None:
    """Return the finding that a problem belongs to, or None."""
    for known in KNOWN_FAILURES:
        if scenario in known.scenarios and re.search(known.text, text, re.DOTALL):
            return known.finding
    return None
