"""Draws the pictures of the documentation, from the layout code itself.

    python docs/pictures/draw.py            writes the .svg files beside this script

What a picture says of bytes is asked of `nvfp4_prep_kernels`: index tensors go through the same functions as weights,
and where they end up is what is drawn. A test compares the committed files with what this script makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.gate_up import interleave_gate_up
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales

INK, FAINT, PAPER = "#1f2328", "#6e7781", "#ffffff"
GATE = ("#0550ae", "#0969da", "#1f6feb", "#388bfd")
UP = ("#8a3800", "#a64200", "#bc4c00", "#d1621b")
BANDS = ("#0969da", "#1a7f37", "#bf8700", "#cf222e")


class Svg:
    """A drawing, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = PAPER, radius: int = 0
    ) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}"'
            f' stroke="{stroke}"/>'
        )

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", fill: str = INK, size: int = 13) -> None:
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1.5) -> None:
        self._parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}" stroke-width="{width:g}"/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, stroke: str = INK) -> None:
        """A horizontal or vertical line with a head at its end."""
        self.line(x1, y1, x2, y2, stroke)
        dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        points = [(x2, y2), (x2 - 8 * dx - 4 * dy, y2 - 8 * dy - 4 * dx), (x2 - 8 * dx + 4 * dy, y2 - 8 * dy + 4 * dx)]
        self._parts.append(f'<polygon points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" fill="{stroke}"/>')

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


@dataclass(frozen=True)
class Run:
    """Neighbouring prepared rows that were neighbours in one source projection."""

    side: str
    source_row: int
    prepared_row: int
    rows: int


def interleave_runs(intermediate: int, block: int) -> list[Run]:
    """Where the layout code puts each row of gate and up."""
    numbers = torch.arange(intermediate, dtype=torch.int32).reshape(-1, 1)
    rows = interleave_gate_up(numbers, numbers + intermediate, block).flatten().tolist()
    found = []
    for _, group in groupby(enumerate(rows), key=lambda item: item[1] - item[0]):
        run = list(group)
        prepared, source = run[0]
        side, row = ("up", source - intermediate) if source >= intermediate else ("gate", source)
        found.append(Run(side, row, prepared, len(run)))
    return found


def swizzle_source(rows: int, cols: int) -> list[tuple[int, int]]:
    """For each stored byte the row and column of the block scale in it, as the layout code has it."""
    offsets = torch.arange(rows * cols, dtype=torch.int64).reshape(rows, cols)
    low, high = (offsets % 256).to(torch.uint8), (offsets // 256).to(torch.uint8)
    stored = swizzle_scales(low).long() + 256 * swizzle_scales(high).long()
    return [divmod(int(value), cols) for value in stored.flatten()]


def draw_interleave() -> Svg:
    """w13: gate and up alternate in blocks, up first."""
    intermediate, block = 256, 64
    return draw_rows(interleave_runs(intermediate, block), intermediate, block)


def draw_rows(runs: list[Run], intermediate: int, block: int) -> Svg:
    """Draw where each run of rows of gate and up lies in w13; ``intermediate`` is four times ``block``."""
    svg = Svg(760, 500, "Order of the rows of w13")
    svg.text(
        380, 26, f"Rows of w13, intermediate size {intermediate}, blocks of {block} rows", anchor="middle", size=16
    )
    scale, top = 46 / block, 64
    sides = {"gate": (40, 70, GATE), "up": (40, 70 + intermediate * scale + 24, UP)}
    svg.text(130, top - 8, "source: two tensors", anchor="middle", fill=FAINT)
    svg.text(600, top - 8, "prepared: one tensor", anchor="middle", fill=FAINT)
    for run in runs:
        x, y, colours = sides[run.side]
        colour = colours[run.source_row // block % len(colours)]
        height = run.rows * scale
        source_y, y_to = y + run.source_row * scale, 70 + run.prepared_row * scale
        svg.line(220, source_y + height / 2, 510, y_to + height / 2, colour, 2)
        last = run.source_row + run.rows - 1
        for left, upper in ((x, source_y), (510, y_to)):
            svg.box(left, upper, 180, height, colour)
            svg.text(
                left + 90, upper + height / 2 + 5, f"{run.side} {run.source_row} … {last}", anchor="middle", fill=PAPER
            )
        svg.text(698, y_to + 12, str(run.prepared_row), fill=FAINT, size=11)
    svg.text(
        380,
        486,
        "prepared row n, b = n div 128, j = n mod 128: j < 64 is up row 64b + j, else gate row 64b + j - 64",
        anchor="middle",
        fill=FAINT,
        size=12,
    )
    return svg


def trtllm_rows(tensor: PreparedTensor) -> list[tuple[str, int]]:
    """For each of the first 32 prepared rows of a TRTLLM-gen weight the projection and source row in it."""
    dims = MoeDims(experts=1, intermediate=128, hidden=256)
    layout = MoeLayout.trtllm(gated=True)
    rows, columns = layout.source_shape(tensor, dims)
    numbers = torch.arange(rows, dtype=torch.uint8).reshape(-1, 1).expand(-1, columns)
    sides = ("gate", "up") if tensor.is_w13 else ("down",)
    stored = [layout.apply(tensor, *(numbers if name == side else 0 * numbers for name in sides)) for side in sides]
    marks = [layout.apply(tensor, *(torch.full_like(numbers, int(name == side)) for name in sides)) for side in sides]
    found = []
    for row in range(32):
        side = next(index for index, mark in enumerate(marks) if int(mark[row, 0]))
        found.append((sides[side], int(stored[side][row, 0])))
    return found


def draw_trtllm_rows() -> Svg:
    """The first 32 prepared rows of w13 and of w2 for TRTLLM-gen."""
    svg = Svg(760, 468, "Order of the rows for TRTLLM-gen")
    svg.text(380, 26, "TRTLLM-gen: source rows in the first 32 prepared rows", anchor="middle", size=16)
    blocks = [
        (PreparedTensor.W13_WEIGHT, "w13, gated: up and gate alternate; 16 rows of each", 64),
        (PreparedTensor.W2_WEIGHT, "w2: the rows of the down projection, in blocks of 32", 260),
    ]
    for tensor, title, top in blocks:
        svg.text(380, top, title, anchor="middle", fill=FAINT)
        for row, (side, source) in enumerate(trtllm_rows(tensor)):
            line, column = divmod(row, 8)
            x, y = 70 + column * 82, top + 12 + line * 38
            colour = {"gate": GATE[1], "up": UP[1], "down": BANDS[source % 32 // 8]}[side]
            svg.box(x, y, 82, 38, colour)
            svg.text(x + 41, y + 24, f"{side} {source}", anchor="middle", fill=PAPER, size=12)
            if column == 0:
                svg.text(62, y + 24, str(row), anchor="end", fill=FAINT, size=11)
    svg.text(
        380,
        446,
        "z(n) = 32·(n div 32) + 4·(n mod 8) + (n mod 32) div 8; w13 row n: up z/2 if z is even, else gate (z - 1)/2;"
        " w2 row n: z",
        anchor="middle",
        fill=FAINT,
        size=11,
    )
    return svg


def draw_swizzle() -> Svg:
    """One tile of 128 x 4 block scales and the order of the tiles."""
    svg = Svg(900, 640, "Swizzle of the block scales")
    svg.text(450, 26, "Block scales: tiles of 128 rows x 4 columns, 512 bytes each", anchor="middle", size=16)
    svg.text(150, 56, "source tile (row-major)", anchor="middle", fill=FAINT)
    svg.text(640, 56, "stored: 32 lines of 16 bytes", anchor="middle", fill=FAINT)
    height, width = 4.0, 22
    for band in range(4):
        y = 66 + (band * 32 + 16) * height
        svg.text(100, y + 4, f"rows {32 * band} … {32 * band + 31}", anchor="end", size=11)
        svg.box(106, 66 + band * 128, 4 * width, 128, BANDS[band])
    for col in range(4):
        svg.text(106 + (col + 0.5) * width, 66 + 512 + 14, str(col), anchor="middle", fill=FAINT, size=11)
    svg.arrow(206, 322, 236, 322)
    places = swizzle_source(128, 4)
    shown = [*range(6), *range(30, 32)]
    for position, line in enumerate(shown):
        y = 78 + position * 42 + (24 if line >= 30 else 0)
        svg.text(290, y + 18, f"byte {line * 16}", anchor="end", fill=FAINT, size=11)
        for byte in range(16):
            row, col = places[line * 16 + byte]
            svg.box(298 + byte * 36, y, 36, 28, BANDS[row // 32])
            svg.text(298 + byte * 36 + 18, y + 18, f"{row},{col}", anchor="middle", fill=PAPER, size=10)
    svg.text(586, 78 + 6 * 42 + 12, "⋮", anchor="middle", size=16)
    svg.text(
        586,
        452,
        "Each cell: row, column of the scale that is stored there. Four neighbouring columns",
        anchor="middle",
        fill=FAINT,
        size=12,
    )
    svg.text(586, 470, "stay together, so the swizzle moves 32-bit words.", anchor="middle", fill=FAINT, size=12)
    _draw_tile_order(svg, 420, 500)
    svg.text(
        450,
        628,
        "offset(m, k) = (m div 128)·(Kp/4)·512 + (k div 4)·512 + (m mod 32)·16 + (m mod 128 div 32)·4 + k mod 4",
        anchor="middle",
        fill=FAINT,
        size=12,
    )
    return svg


def _draw_tile_order(svg: Svg, x: float, y: float) -> None:
    rows, cols = 256, 16
    places = swizzle_source(rows, cols)
    order = [(places[start][0] // 128, places[start][1] // 4) for start in range(0, rows * cols, 512)]
    svg.text(x - 12, y + 30, "tiles of a", anchor="end", fill=FAINT, size=11)
    svg.text(x - 12, y + 46, f"{rows} x {cols} matrix", anchor="end", fill=FAINT, size=11)
    svg.text(x - 12, y + 62, "in storage order", anchor="end", fill=FAINT, size=11)
    for number, (tile_row, tile_col) in enumerate(order):
        svg.box(x + tile_col * 80, y + tile_row * 46, 80, 46, "#57606a")
        svg.text(x + tile_col * 80 + 40, y + tile_row * 46 + 28, str(number), anchor="middle", fill=PAPER)


def rank_rows(tensor: PreparedTensor, tp: int) -> list[int]:
    """For each prepared row of w13 (or each 16-byte-wide column block of w2) the rank that owns it."""
    dims = MoeDims(experts=1, intermediate=256, hidden=256)
    layout = MoeLayout.cutedsl(gated=True)
    share = dims.intermediate // tp
    if tensor.is_w13:
        owner = (torch.arange(dims.intermediate) // share).to(torch.uint8).reshape(-1, 1).expand(-1, dims.hidden // 2)
        return [int(row[0]) for row in layout.apply(tensor, owner.contiguous(), owner.contiguous())]
    columns = layout.source_shape(tensor, dims)[1]
    owner = (torch.arange(columns) * tp // columns).to(torch.uint8).reshape(1, -1).expand(dims.hidden, -1)
    stored = layout.apply(tensor, owner.contiguous())
    return [int(value) for value in stored.flatten()]


def draw_ranks() -> Svg:
    """What a tensor-parallel rank reads of the prepared tensors."""
    tp = 2
    svg = Svg(760, 330, "What each tensor-parallel rank reads")
    svg.text(380, 26, f"What {tp} tensor-parallel ranks read of one expert", anchor="middle", size=16)
    colours = (GATE[0], UP[0])
    specs = [
        (PreparedTensor.W13_WEIGHT, "w13_weight, w13_weight_scale", "rows: one run each", 40),
        (PreparedTensor.W2_WEIGHT, "w2_weight", "byte columns of each row", 290),
        (PreparedTensor.W2_WEIGHT_SCALE, "w2_weight_scale", "whole tiles of 512 bytes", 540),
    ]
    for tensor, name, note, x in specs:
        svg.text(x + 90, 62, name, anchor="middle", size=12)
        svg.text(x + 90, 290, note, anchor="middle", fill=FAINT, size=12)
        owners = rank_rows(tensor, tp)
        if tensor.is_w13:
            for owner, group in groupby(range(len(owners)), key=owners.__getitem__):
                rows = list(group)
                svg.box(x, 74 + rows[0] * 196 / len(owners), 180, len(rows) * 196 / len(owners), colours[owner])
                svg.text(
                    x + 90,
                    74 + (rows[0] + len(rows) / 2) * 196 / len(owners) + 4,
                    f"rank {owner}: rows {rows[0]} … {rows[-1]}",
                    anchor="middle",
                    fill=PAPER,
                    size=11,
                )
            continue
        lines, per_line = (8, len(owners) // 8) if tensor.is_scale else (8, len(owners) // 256)
        for line in range(lines):
            cells = owners[line * per_line : (line + 1) * per_line]
            for owner, group in groupby(range(per_line), key=cells.__getitem__):
                run = list(group)
                svg.box(x + run[0] * 180 / per_line, 74 + line * 24.5, len(run) * 180 / per_line, 24.5, colours[owner])
    svg.text(
        380,
        316,
        "I = H = 256; 8 of the 256 rows of w2_weight, the 8 tiles of w2_weight_scale in storage order",
        anchor="middle",
        fill=FAINT,
        size=11,
    )
    return svg


def draw_data_path() -> Svg:
    """From the source to the servers: once offline, then at every start."""
    svg = Svg(860, 300, "Data flow")

    def stage(x: float, y: float, height: float, title: str, lines: list[str], fill: str) -> None:
        svg.box(x, y, 190, height, fill, INK, 6)
        svg.text(x + 95, y + 22, title, anchor="middle")
        for number, line in enumerate(lines):
            svg.text(x + 95, y + 42 + 17 * number, line, anchor="middle", fill=FAINT, size=11)

    source, tool, prepared, server = "#f6f8fa", "#ddf4ff", "#dafbe1", "#fff8c5"
    svg.text(430, 28, "once, offline, on a CPU", anchor="middle", size=14)
    stage(20, 48, 86, "source checkpoint", ["directory or Hub id", "12 tensors per expert"], source)
    stage(335, 48, 86, "convert", ["rearrange, invert, compare", "with the source, write"], tool)
    stage(650, 48, 86, "prepared checkpoint", ["8 or 9 tensors per MoE layer", "manifest with digests"], prepared)
    svg.arrow(210, 91, 333, 91)
    svg.arrow(525, 91, 648, 91)
    stage(20, 196, 86, "restore", ["the source's tensors", "and configs, bit for bit"], tool)
    stage(
        335,
        196,
        86,
        "verify, relayout, push",
        ["against manifest and source", "CuteDSL and TRTLLM-gen", "to the Hub"],
        tool,
    )
    svg.text(745, 184, "at every start", anchor="end", size=14)
    stage(650, 196, 38, "vLLM with the plugin", [], server)
    stage(650, 244, 38, "SGLang with the plugin", [], server)
    svg.line(840, 91, 850, 91, INK)
    svg.line(850, 91, 850, 263, INK)
    svg.arrow(850, 215, 842, 215)
    svg.arrow(850, 263, 842, 263)
    svg.line(690, 134, 690, 164, INK)
    svg.line(690, 164, 150, 164, INK)
    svg.arrow(430, 164, 430, 194)
    svg.arrow(150, 164, 150, 194)
    svg.arrow(70, 196, 70, 136)
    return svg


def measured(part: str) -> dict[str, Any]:
    """The figures of a part of the benchmarks."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / f"{part}.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return figures


def draw_loading(vllm: dict[str, Any] | None = None, load: dict[str, Any] | None = None) -> Svg:
    """Median seconds of the loads as bars: figures of the parts load-vllm and load, or those on file."""
    vllm, load = vllm or measured("load-vllm"), load or measured("load")
    rows = [(row["side"], row["total"]["median"]) for row in vllm["rows"]]
    others = [(row["side"], row["median"]) for row in load["sides"] if "failed" not in row]
    nbytes = next(row["nbytes"] for row in load["sides"] if row["way"] == "ours")
    experts = load["experts"] * load["layers"]
    size = f"{vllm['experts']} experts of Kimi-K2.5, {vllm['rows'][0]['nbytes'] / 1e9:.2f} GB"
    tables = [
        (f"The whole load by vLLM's own code: {size}", rows),
        (f"Weights alone, until ready to run: {experts} experts, {nbytes / 1e9:.2f} GB", others),
    ]
    svg = Svg(860, 110 + sum(56 + 24 * len(rows) for _, rows in tables), "Load times")
    svg.text(430, 26, "Load times on one GPU, files in memory, median seconds", anchor="middle", size=16)
    y = 50.0
    for title, rows in tables:
        svg.text(20, y + 16, title, size=13)
        longest = max(seconds for _, seconds in rows)
        for number, (label, seconds) in enumerate(rows):
            top = y + 28 + 24 * number
            ours, limit = "nvfp4_prep" in label, label.startswith("pinned")
            colour = UP[2] if ours else FAINT if label.startswith("original") else "#8c959f" if limit else GATE[1]
            svg.text(330, top + 14, label, anchor="end", size=12)
            svg.box(338, top + 2, 440 * seconds / longest, 17, colour)
            svg.text(344 + 440 * seconds / longest, top + 15, f"{seconds:.3f}", size=12)
        y += 56 + 24 * len(rows)
    svg.text(
        430,
        y + 20,
        "Figures and commands: docs/loading.md. Grey: original checkpoint; blue: prepared, other loaders;",
        anchor="middle",
        fill=FAINT,
        size=12,
    )
    svg.text(
        430,
        y + 38,
        "orange: prepared, the loader of this package; pale grey: copy of the same bytes from pinned memory.",
        anchor="middle",
        fill=FAINT,
        size=12,
    )
    return svg


PICTURES: dict[str, Callable[[], Svg]] = {
    "data-path.svg": draw_data_path,
    "interleave.svg": draw_interleave,
    "loading.svg": draw_loading,
    "ranks.svg": draw_ranks,
    "swizzle.svg": draw_swizzle,
    "trtllm-rows.svg": draw_trtllm_rows,
}


def main() -> None:
    """Writes all pictures."""
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
