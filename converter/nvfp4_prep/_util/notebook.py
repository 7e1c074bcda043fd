"""Results as a notebook shows them: a line, a small table and a picture of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from nvfp4_prep._util.layer_strip import LayerCell, layer_strip
from nvfp4_prep._util.printable import printable
from nvfp4_prep._util.text import bounded

__all__ = ["notebook_html"]

_LIMIT = 500
"""Characters of a value: names come from files that anybody may have written."""


def notebook_html(title: str, rows: Mapping[str, object], cells: Sequence[LayerCell]) -> str:
    """Return an HTML fragment; everything in it is escaped, nothing is loaded from anywhere.

    Args:
        title: what it is.
        rows: facts by name; empty ones are left out.
        cells: the layers.
    """
    lines = "".join(
        f"<tr><th style='text-align:left'>{_text(name)}</th><td style='text-align:left'>{_text(value)}</td></tr>"
        for name, value in rows.items()
        if value not in ("", None)
    )
    picture = layer_strip(cells) if cells else ""
    return f"<div><b>{_text(title)}</b><table>{lines}</table>{picture}</div>"


def _text(value: object) -> str:
    return escape(printable(bounded(str(value), _LIMIT)))
