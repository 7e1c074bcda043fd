"""The report's page: what is told of experts that gave nothing to compare, of NaN, and of hostile names."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nvfp4_prep.output.report_file import REPORT_MARKER
from nvfp4_prep.smoke.chart import error_chart
from nvfp4_prep.smoke.figures import CaseFigures, ErrorFigures, ExpertFigures, NoiseFloor
from nvfp4_prep.smoke.html import make_page
from nvfp4_prep.smoke.report import BackendFacts, LayerReport, SmokeReport

ERRORS = ErrorFigures(0.999999, 1e-6, 1e-3, 0.5, 1e-5, 0, 1.0)


def make_report(*figures: ErrorFigures, checkpoint: str = "org/model") -> SmokeReport:
    experts = tuple(ExpertFigures(number, 4, errors, 0, None) for number, errors in enumerate(figures))
    layer = LayerReport(
        name="model.layers.3.mlp.experts",
        index=3,
        experts=len(experts),
        experts_total=len(experts),
        amplitude=0.5,
        intermediate_range=0.5,
        cases=(CaseFigures("one idle", 2, 4, 3, 1, ERRORS),),
        figures=experts,
        noise=NoiseFloor(1, 1e-7, 0.1),
        padded_outputs_not_zero=0,
        dirty_padding=0,
        wrong_scalars=(),
    )
    return SmokeReport(checkpoint, "source", BackendFacts("torch", False, "no GPU", "CPU", {}), 1, (layer,))


class Text(HTMLParser):
    """The page's text, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_page_begins_with_the_marker() -> None:
    assert REPORT_MARKER in make_page(make_report(ERRORS))[:300]


def test_page_names_experts_that_gave_nothing_to_compare() -> None:
    report = make_report(ERRORS, replace(ERRORS, reference_rms=0.0))
    page = Text(make_page(report))
    assert "Not judged" in page.words and "Passed" in page.words
    assert ": expert 1: reference is zero" in page.words
    alone = Text(make_page(make_report(replace(ERRORS, reference_rms=0.0))))
    assert "Inconclusive" in alone.words
    assert "Not judged" not in Text(make_page(make_report(ERRORS))).words


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_nan_is_shown_wherever_it_stands(position: int) -> None:
    figures = [ERRORS, ERRORS, ERRORS]
    figures[position] = replace(ERRORS, cosine=math.nan, relative=math.nan, worst=math.nan)
    report = make_report(*figures)
    page = Text(make_page(report))
    assert page.words.count("nan") >= 4  # layer's cosine and error, expert's cosine and error
    assert "Failed" in page.words
    bar = error_chart(report.layers).bars[0]
    assert (bar.high, bar.low) == (10.0, error_chart(make_report(ERRORS).layers).bars[0].low)


def test_names_are_text() -> None:
    page = make_page(make_report(ERRORS, checkpoint="<script>x</script>{{ 7 * 6 }}\u202e\x1b"))
    assert "script" not in Text(page).tags
    assert "{{ 7 * 6 }}" in page and "\u202e" not in page and "\x1b" not in page
