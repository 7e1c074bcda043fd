"""The pictures of notebook.ipynb, of real bytes, drawn by the generator of docs/pictures."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "pictures"))

from draw import BANDS, FAINT, Run, Svg, draw_rows


class Picture:
    """A drawing that a notebook shows."""

    def __init__(self, svg: Svg) -> None:
        self._svg = str(svg)

    def _repr_svg_(self) -> str:
        return self._svg


def find_rows(prepared: torch.Tensor, **sources: torch.Tensor) -> list[tuple[str, int]]:
    """Return, for each prepared row, the name of the source tensor and the row in it that holds the same bytes.

    Raises:
        ValueError: if two source rows are equal, so that the bytes alone do not say which of them it is.
        KeyError: if a prepared row is in none of the sources.
    """
    known: dict[bytes, tuple[str, int]] = {}
    for name, tensor in sources.items():
        for number, row in enumerate(tensor):
            if known.setdefault(row.numpy().tobytes(), (name, number)) != (name, number):
                raise ValueError(f"row {number} of {name} is not unique")
    return [known[row.numpy().tobytes()] for row in prepared]


def rows_picture(prepared: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Picture:
    """Draw gate and up as the source has them, w13 as the kernel wants it, and which rows went where."""
    found = find_rows(prepared, gate=gate, up=up)
    runs = []
    for _, group in groupby(enumerate(found), key=lambda item: (item[1][0], item[1][1] - item[0])):
        run = list(group)
        row, (side, source_row) = run[0]
        runs.append(Run(side, source_row, row, len(run)))
    return Picture(draw_rows(runs, gate.shape[0], runs[0].rows))


def scales_picture(tile: torch.Tensor, stored: torch.Tensor) -> Picture:
    """Draw one tile of block scales [128, 4] and its stored bytes as [32, 16]; the darker, the larger the byte."""
    svg = Svg(760, 600, "Block scales of one tile, as the source has them and as they are stored")
    largest = max(int(tile.max()), 1)
    svg.text(160, 26, "source: 128 rows of 4", anchor="middle", fill=FAINT)
    for row in range(128):
        for column in range(4):
            shade = int(tile[row, column]) / largest
            svg.box(120 + 20 * column, 40 + 4 * row, 20, 4, tint(BANDS[row // 32], shade), stroke="none")
    for band in range(4):
        svg.text(112, 40 + 128 * band + 68, f"rows {32 * band} … {32 * band + 31}", anchor="end", size=11)
    svg.arrow(215, 296, 265, 296)
    svg.text(500, 26, "stored: 32 lines of 16 bytes", anchor="middle", fill=FAINT)
    for line in range(32):
        for byte in range(16):
            shade = int(stored[line, byte]) / largest
            svg.box(300 + 25 * byte, 40 + 16 * line, 25, 16, tint(BANDS[byte // 4], shade), stroke="none")
    svg.text(500, 572, "line m mod 32, byte 4·(m div 32) + k", anchor="middle", fill=FAINT, size=12)
    return Picture(svg)


def tint(colour: str, shade: float) -> str:
    """Return a colour between nearly white (0) and itself (1)."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(235 + (part - 235) * shade):02x}" for part in parts)
