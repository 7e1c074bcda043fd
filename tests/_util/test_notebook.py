"""What a notebook shows of plans, inspections and verifications: the layers as a picture, everything escaped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nvfp4_prep import inspect, plan, verify
from nvfp4_prep._util.layer_strip import LayerCell, layer_strip
from nvfp4_prep.commands.inspect import Inspection

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e'\""


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.mark.slow
def test_every_result_has_a_picture_of_its_layers(sample_source: Path, sample_prepared: Path) -> None:
    made = plan(sample_source)
    for result, words in (
        (made, "to prepare"),
        (inspect(sample_source), "can be prepared"),
        (inspect(sample_prepared), "prepared"),
        (verify(sample_prepared), "nothing wrong"),
    ):
        shown = Tags(result._repr_html_())
        assert shown.tags.count("rect") == len(made.layers) == 2
        assert shown.text.count(f"mlp.experts: {words}") == 2


def test_damage_is_red(sample_prepared: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(sample_prepared, tmp_path / "out"))
    (out / "experts-layer-00002.safetensors").unlink()
    html = verify(out, quick=True)._repr_html_()
    assert "verification FAILED" in html and html.count("#c0392b") == 1
    assert "files</th><td style='text-align:left'>not run" in html


def test_names_from_outside_are_text(sample_prepared: Path) -> None:
    found: Inspection = inspect(sample_prepared)
    layer = replace(found.layers[0], experts_path=HOSTILE, reason=HOSTILE)
    hostile = replace(found, path=HOSTILE, refusal=HOSTILE, architectures=(HOSTILE,), layers=(layer,))
    html = hostile._repr_html_()
    assert ">1 MoE layer<" in html and 'aria-label="1 layer"' in html
    assert "script" not in Tags(html).tags
    assert "\x1b" not in html and "\u202e" not in html
    assert len(replace(found, path="x" * 100_000)._repr_html_()) < 10_000


@pytest.mark.parametrize("number", [1, 16, 17, 61])
def test_a_strip_is_well_formed_and_its_cells_are_apart(number: int) -> None:
    root = ElementTree.fromstring(layer_strip([LayerCell(str(i), "good", "<&>") for i in range(number)]))
    places = {(rect.get("x"), rect.get("y")) for rect in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert len(places) == number
    width, height = map(int, root.attrib["viewBox"].split()[2:])
    assert all(int(x or -1) + 26 <= width and int(y or -1) + 26 <= height for x, y in places)
