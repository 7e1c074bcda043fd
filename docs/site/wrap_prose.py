"""Fills the prose of README and docs to 120 columns, as the code is, so that a page has one form.

    python docs/site/wrap_prose.py            # rewrites the pages that differ
    python docs/site/wrap_prose.py --check    # names them; exit code 1

Code, tables, headings, pictures and comments stay as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 120
_FENCE = re.compile(r"^ *(```|~~~)")
_ITEM = re.compile(r"^( *(?:[-*]|\d+\.) +)(.*)$")
_AS_IT_IS = re.compile(r"^(#|\||<|!\[| {4}|$)")
_WORD = re.compile(r"(?:`[^`]*`|\S)+")
_NEVER_FIRST = re.compile(r"^([-+*=]+$|[#<>|]|\d+[.)]$)")
"""Words that would begin a list, heading, quotation, table or HTML block at the start of a line."""


def pages() -> list[Path]:
    """Return the pages that are wrapped."""
    names = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").glob("*.md"))]


def wrapped(text: str) -> str:
    """Return Markdown with every paragraph and list item filled to ``WIDTH`` columns."""
    lines: list[str] = []
    paragraph: list[str] = []
    first = after = ""
    in_code = False

    def end_paragraph() -> None:
        nonlocal first, after
        if paragraph:
            lines.extend(filled(" ".join(paragraph), first, after))
        paragraph.clear()
        first = after = ""

    for line in text.split("\n"):
        fence = _FENCE.match(line)
        item = _ITEM.match(line)
        if in_code or fence or (_AS_IT_IS.match(line) and not item and not (paragraph and line.startswith("    "))):
            end_paragraph()
            in_code ^= bool(fence)
            lines.append(line)
        elif item:
            end_paragraph()
            first, after = item[1], " " * len(item[1])
            paragraph.append(item[2].strip())
        else:
            if not paragraph:
                first = after = " " * (len(line) - len(line.lstrip()))
            paragraph.append(line.strip())
    end_paragraph()
    return "\n".join(lines)


def filled(text: str, first: str, after: str) -> list[str]:
    """Return one paragraph as lines, the first after ``first``, the others after ``after``. Code in backticks is not
    broken."""
    lines, line = [], first
    for word in _WORD.findall(text):
        begun = line.strip() and line != first
        if begun and len(line) + 1 + len(word) > WIDTH and not _NEVER_FIRST.match(word):
            lines.append(line)
            line = after + word
        else:
            line += f" {word}" if begun else word
    return [*lines, line]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    changed = [page for page in pages() if wrapped(page.read_text("utf-8")) != page.read_text("utf-8")]
    for page in changed:
        print(page.relative_to(ROOT))
        if not options.check:
            page.write_text(wrapped(page.read_text("utf-8")), encoding="utf-8")
    sys.exit(bool(changed) and options.check)


if __name__ == "__main__":
    main()
