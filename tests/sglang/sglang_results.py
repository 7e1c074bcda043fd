"""The rows that are printed at the end, and as docs/sglang-models.md and docs/serving-sglang.md show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.paths import ROOT

TABLE: list[dict[str, Any]] = []
"""Rows of test_sglang_models.py."""
REFUSALS: list[tuple[str, str]] = []
"""What was refused, and the message."""
SERVERS: list[tuple[str, str]] = []
"""Server processes, and what became of them."""
WHOLE = {"table": 0, "servers": 0}
"""How many rows a whole run gives; the modules that make them say it."""
PAGES: dict[str, Path] = {
    "table": ROOT / "docs" / "sglang-models.md",
    "servers": ROOT / "docs" / "serving-sglang.md",
}
_BEGIN, _END = "<!-- written by make test-sglang: {} -->\n", "<!-- end of {} -->\n"
_BACKEND = "flashinfer_"


def table_lines() -> list[str]:
    """One line a row, as Markdown; backends and layouts without the prefix that all of them have."""
    head = "| model | file | parallel | backend | result | values compared | tensors read | expert loader calls |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in TABLE:
        read, calls = (f"{row['source'][key]} → {row['prepared'][key]}" for key in ("tensors", "calls"))
        values = (row[key] for key in ("model", "file", "parallel", "backend", "result", "compared"))
        lines.append(f"| {' | '.join((*values, read, calls))} |".replace(_BACKEND, ""))
    return lines


def server_lines() -> list[str]:
    """The server processes as Markdown."""
    return ["| server process with | result |", "|---|---|", *(f"| {what} | {result} |" for what, result in SERVERS)]


def parts() -> dict[str, list[str]]:
    """The parts of the pages that tests write."""
    return {"table": table_lines(), "servers": server_lines()}


def is_whole() -> bool:
    """Whether every row was made: the page cannot be written from a part of the tests."""
    return {"table": len(TABLE), "servers": len(SERVERS)} == WHOLE and all(WHOLE.values())


def written(name: str) -> str:
    """Return the page of a part with the rows of this run."""
    begin, end = _BEGIN.format(name), _END.format(name)
    before, _, rest = PAGES[name].read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    assert before and ended, f"{PAGES[name]} has no place for {name}"
    return f"{before}{begin}\n" + "\n".join(parts()[name]) + f"\n\n{end}{after}"
