"""A small picture of a model's layers: one cell a layer, as SVG for reports and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nvfp4_prep._util.printable import printable
from nvfp4_prep._util.text import count

__all__ = ["LayerCell", "layer_strip"]

_COLUMNS = 16
_CELL, _GAP = 26, 3
_COLOURS = {"good": "#2e8b57", "bad": "#c0392b", "other": "#8a94a3", "plain": "#2f6fbb"}


@dataclass(frozen=True)
class LayerCell:
    """One layer.

    Attributes:
        label: what stands in the cell, two or three characters.
        kind: ``good``, ``bad``, ``other`` (not prepared) or ``plain``; its colour.
        words: shown when the pointer rests on the cell.
    """

    label: str
    kind: str
    words: str


def layer_strip(cells: Sequence[LayerCell]) -> str:
    """Return an SVG of rows of cells, 16 a row; it scales down on a narrow screen and prints without a background."""
    columns, rows = min(len(cells), _COLUMNS), -(-len(cells) // _COLUMNS)
    width, height = columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _GAP) + _GAP
    drawn = "".join(_drawn(number, cell) for number, cell in enumerate(cells))
    label = count(len(cells), "layer")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 1)} {max(height, 1)}" role="img"'
        f' aria-label="{label}" style="width:{width}px;max-width:100%;height:auto;display:block">'
        f"{drawn}</svg>"
    )


def _drawn(number: int, cell: LayerCell) -> str:
    x = _GAP + number % _COLUMNS * (_CELL + _GAP)
    y = _GAP + number // _COLUMNS * (_CELL + _GAP)
    label = escape(printable(cell.label)[:4])
    middle = f'x="{x + _CELL / 2}" y="{y + _CELL / 2 + 4}" text-anchor="middle"'
    return (
        f"<g><title>{escape(printable(cell.words))}</title>"
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" rx="4" fill="{_COLOURS[cell.kind]}"/>'
        f'<text {middle} style="fill:#fff;font:11px system-ui,sans-serif">{label}</text></g>'
    )
