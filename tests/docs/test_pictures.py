"""The pictures are what the script draws, and what it draws of the layout is true by the formulas."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from xml.etree import ElementTree

import pytest

from support.paths import ROOT

FOLDER = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_pictures", FOLDER / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_committed_pictures_are_what_the_script_draws(draw: ModuleType) -> None:
    assert {path.name for path in FOLDER.glob("*.svg")} == set(draw.PICTURES)
    for name, make in draw.PICTURES.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == str(make()), f"run docs/pictures/draw.py ({name})"


def test_pictures_are_well_formed_and_inside_their_frame(draw: ModuleType) -> None:
    for name, make in draw.PICTURES.items():
        root = ElementTree.fromstring(str(make()))
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        for item in root.iter("{http://www.w3.org/2000/svg}rect"):
            x, y = float(item.get("x", 0)), float(item.get("y", 0))
            assert x + float(item.attrib["width"]) <= width, name
            assert y + float(item.attrib["height"]) <= height, name


@pytest.mark.parametrize(("intermediate", "block"), [(256, 64), (192, 16), (64, 32)])
def test_interleave_drawn_is_the_formula(draw: ModuleType, intermediate: int, block: int) -> None:
    drawn = {}
    for run in draw.interleave_runs(intermediate, block):
        for row in range(run.rows):
            drawn[run.prepared_row + row] = (run.side, run.source_row + row)
    want = {}
    for n in range(2 * intermediate):
        b, j = divmod(n, 2 * block)
        want[n] = ("up", block * b + j) if j < block else ("gate", block * b + j - block)
    assert drawn == want


def test_trtllm_rows_drawn_are_the_formula(draw: ModuleType) -> None:
    """The formula of docs/layout.md, in plain Python."""
    order = [32 * (n // 32) + 4 * (n % 8) + (n % 32) // 8 for n in range(32)]
    w13 = [("gate" if z % 2 else "up", z // 2) for z in order]
    assert draw.trtllm_rows(draw.PreparedTensor.W13_WEIGHT) == w13
    assert draw.trtllm_rows(draw.PreparedTensor.W2_WEIGHT) == [("down", z) for z in order]


def test_swizzle_drawn_is_the_formula(draw: ModuleType) -> None:
    rows, cols = 256, 8
    drawn = {place: offset for offset, place in enumerate(draw.swizzle_source(rows, cols))}
    for m in range(rows):
        for k in range(cols):
            offset = m // 128 * (cols // 4) * 512 + k // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
            assert drawn[m, k] == offset


def test_ranks_drawn_are_the_formula(draw: ModuleType) -> None:
    """I = H = 256 over two ranks: half the rows of w13, half the columns of w2, tiles of the rank's own columns."""
    tensor = draw.PreparedTensor
    assert draw.rank_rows(tensor.W13_WEIGHT, 2) == [0] * 256 + [1] * 256
    assert draw.rank_rows(tensor.W2_WEIGHT, 2) == ([0] * 64 + [1] * 64) * 256
    assert draw.rank_rows(tensor.W2_WEIGHT_SCALE, 2) == ([0] * 1024 + [1] * 1024) * 2
