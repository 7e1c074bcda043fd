"""The report's page: what is told of experts that gave nothing to compare, of NaN, and of hostile names; and that its
figures are those of the verification and the smoke run that it shows."""

from __future__ import annotations

import hashlib
import math
import platform
import re
import shutil
import socket
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nvfp4_prep import verify
from nvfp4_prep.output.report_file import REPORT_MARKER
from nvfp4_prep.report import page as page_module
from nvfp4_prep.report.chart import error_chart
from nvfp4_prep.report.page import Subject
from nvfp4_prep.smoke.figures import CaseFigures, ErrorFigures, ExpertFigures, NoiseFloor
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
    return SmokeReport(checkpoint, "source", BackendFacts("torch", False, "no GPU", "CPU", {}, "CuteDSL"), 1, (layer,))


def make_page(smoke: SmokeReport) -> str:
    return page_module.make_page(Subject(smoke.checkpoint, smoke=smoke))


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
    assert math.isnan(report.lowest_cosine) and math.isnan(report.summary()["largest_relative_error"])
    assert (bar.high, bar.low) == (10.0, error_chart(make_report(ERRORS).layers).bars[0].low)


def test_names_are_text() -> None:
    page = make_page(make_report(ERRORS, checkpoint="<script>x</script>{{ 7 * 6 }}\u202e\x1b"))
    assert "script" not in Text(page).tags
    assert "{{ 7 * 6 }}" in page and "\u202e" not in page and "\x1b" not in page


def verified_page(prepared: Path, **extra: object) -> tuple[str, list[str]]:
    found = verify(prepared, **extra)  # type: ignore[arg-type]
    page = page_module.make_page(Subject(str(prepared), found.manifest, found), "nvfp4-prep verify x")
    return page, [word for word in Text(page).words if word]


def test_evidence_is_on_the_page(sample_prepared: Path) -> None:
    page, words = verified_page(sample_prepared)
    manifest = (sample_prepared / "nvfp4_prep.json").read_bytes()
    assert f"sha256 {hashlib.sha256(manifest).hexdigest()}" in words
    assert "nvfp4-prep verify x" in words
    assert any(word.startswith(f"{socket.gethostname()} ({platform.system()}") for word in words)
    assert any(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", word) for word in words)
    assert any(re.fullmatch("vllm .*, sglang .*", word) for word in words)
    assert "@media print" in page and "max-width: 40rem" in page and "http" not in re.sub("xmlns=.*?>", "", page)


def test_every_check_passed_or_is_said_to_be_left_out(sample_source: Path, sample_prepared: Path) -> None:
    _, words = verified_page(sample_prepared, source=sample_source)
    assert words.count("✓ passed") == 5 and words.count("not run") == 1  # the smoke run
    _, words = verified_page(sample_prepared, quick=True)
    assert words.count("✓ passed") == 1 and words.count("not run") == 5
    assert any("1 of 1 check passed" in word and "left out: files, experts" in word for word in words)


def test_damage_is_counted_once_and_named_by_its_check(
    sample_source: Path, sample_prepared: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(sample_prepared, tmp_path / "out"))
    damaged = next(out.glob("experts-layer-00002*"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (out / "extra.bin").write_bytes(b"x")
    found = verify(out, source=sample_source)
    counts = {finding.name: finding.problems for finding in found.findings}
    assert sum(filter(None, counts.values())) == len(found.problems) > 2
    assert counts["structure"] == 1 and counts["files"] == 1 and counts["scales"] == 0
    assert counts["experts"] and counts["source"]
    wrong = [layer.index for layer, problems in found.layer_problems if problems]
    assert wrong == [2]
    page, words = verified_page(out, source=sample_source)
    assert "Failed" in words and "Do not serve this checkpoint." in words
    assert words.count("✗ FAILED") == 4 and page.count('fill="#c0392b"') == 1
    assert f"{len(found.problems)} problems" in words


def test_a_layer_that_a_missing_file_leaves_unchecked_is_not_green(sample_prepared: Path, tmp_path: Path) -> None:
    """The place of such a problem is the checkpoint; its text names the tensor."""
    out = Path(shutil.copytree(sample_prepared, tmp_path / "out"))
    (out / "source-scales.safetensors").unlink()
    found = verify(out)
    assert all(problems for _, problems in found.layer_problems)
    assert {cell.kind for cell in found.layer_cells} == {"bad"}


@pytest.mark.parametrize(
    ("errors", "box"),
    [
        (ERRORS, "good"),
        (replace(ERRORS, worst=2.0, relative=0.5, cosine=0.1), "bad"),
        (replace(ERRORS, reference_rms=0.0), "soft"),
    ],
    ids=["passed", "failed", "inconclusive"],
)
def test_the_first_box_is_green_for_a_pass_alone(errors: ErrorFigures, box: str) -> None:
    assert f"<div class='verdict {box}'>" in make_page(make_report(errors))


def test_the_summary_covers_routings_too() -> None:
    layer = make_report(ERRORS).layers[0]
    far = replace(layer.cases[0], errors=replace(ERRORS, cosine=0.5, relative=0.2, worst=0.9))
    report = replace(make_report(ERRORS), layers=(replace(layer, cases=(far,)),))
    summary = report.summary()
    assert summary["lowest_cosine"] == 0.5 and summary["largest_relative_error"] == 0.2
    assert summary["worst_element_of_tolerance"] == 0.9
    words = Text(make_page(report)).words
    assert "0.9 of its tolerance, over all experts and routings" in words and words.count("0.500000") == 3


def test_exact_experts_fill_no_table() -> None:
    exact = replace(ERRORS, relative=0.0, worst=0.0)
    words = Text(make_page(make_report(exact, exact))).words
    assert "2 experts agree with the reference exactly and are not listed." in words
    assert "layer 3, expert 0" not in words and "layer 3, expert 1" not in words


@pytest.mark.parametrize(("layers", "width"), [(1, 360), (20, 668), (61, 1000)])
def test_a_chart_is_as_wide_as_its_layers_need(layers: int, width: int) -> None:
    chart = error_chart(make_report(ERRORS).layers * layers)
    assert chart.width == width and all(chart.left < bar.x < chart.right for bar in chart.bars)


def test_a_person_approves_in_print_alone(sample_prepared: Path) -> None:
    page, words = verified_page(sample_prepared, quick=True)
    after = words[words.index("Approval") :]
    assert after[-4:] == ["Name", "Decision", "Date", "Signature"]
    screen, print_rules = page.split("@media print")
    assert ".approval { display: none; }" in screen and ".approval { display: block; }" in print_rules


def test_numbers_are_not_broken_in_print(sample_prepared: Path) -> None:
    """Only words may break; and the chart of a model with few layers is not blown up to the width of the paper."""
    page, _ = verified_page(sample_prepared, quick=True)
    print_rules = page.split("@media print")[1].split("</style>")[0]
    breaking = [rule.split("{")[0] for rule in print_rules.split("}") if "overflow-wrap: anywhere" in rule]
    assert [rule.strip() for rule in breaking] == ["td:first-child, td.text, td.words"]
    assert "max-width: 100%" not in print_rules
