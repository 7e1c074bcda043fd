"""The rows that are printed at the end."""

from __future__ import annotations

from typing import Any

TABLE: list[dict[str, Any]] = []
"""Rows of test_sglang_models.py."""
REFUSALS: list[tuple[str, str]] = []
"""What was refused, and the message."""
SERVERS: list[tuple[str, str]] = []
"""Server processes, and what became of them."""


def table_lines() -> list[str]:
    """One line a row, as Markdown."""
    head = "| model | file | parallel | backend | result | compared | tensors read | expert loader calls |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in TABLE:
        read, calls = (f"{row['source'][key]} → {row['prepared'][key]}" for key in ("tensors", "calls"))
        values = (row[key] for key in ("model", "file", "parallel", "backend", "result", "compared"))
        lines.append(f"| {' | '.join((*values, read, calls))} |")
    return lines
