"""The smoke report as one self-contained HTML page, for somebody who has to sign off a deployment."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from nvfp4_prep._util.printable import printable
from nvfp4_prep._util.text import count
from nvfp4_prep.output.report_file import REPORT_MARKER, write_report
from nvfp4_prep.smoke.chart import error_chart
from nvfp4_prep.smoke.report import SmokeReport

__all__ = ["make_page", "write_page"]

_TEMPLATE = "report.html.j2"
_WORST_EXPERTS = 20


def write_page(path: Path, report: SmokeReport, *directories: str | Path | None) -> None:
    """Write the page whole or not at all; errors as of :func:`~nvfp4_prep.output.report_file.write_report`.

    Args:
        path: what the user named.
        report: what is shown.
        directories: checkpoints that nothing is added to.
    """
    write_report(path, make_page(report), *directories)


def make_page(report: SmokeReport) -> str:
    """Return the page. It loads nothing from anywhere."""
    import jinja2  # comes with torch, which requires it; imported here because --help has no use for it
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, keep_trailing_newline=True
    )
    environment.filters |= {"number": _number, "cosine": "{:.6f}".format, "least": _least, "most": _most}
    source = resources.files("nvfp4_prep.smoke").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    figures = [(layer, figure) for layer in report.layers for figure in layer.figures]
    figures.sort(key=lambda pair: -pair[1].worst)
    return environment.from_string(source).render(
        marker=Markup(REPORT_MARKER),
        title=f"Fused-MoE smoke run: {report.checkpoint}",
        report=report,
        coverage=_coverage(report),
        facts=_facts(report),
        problems=[(layer.name, problem) for layer in report.layers for problem in layer.problems],
        notes=[(layer.name, note) for layer in report.layers for note in layer.notes],
        chart=error_chart(report.layers),
        worst=figures[:_WORST_EXPERTS],
        worst_count=_WORST_EXPERTS,
    )


def _shown(value: object) -> object:
    """Return text from outside without characters that reorder or hide; the template escapes it for HTML."""
    return printable(value) if type(value) is str else value


def _coverage(report: SmokeReport) -> str:
    bad = sum(not layer.passed for layer in report.layers)
    text = f"{len(report.layers)} of {report.layers_total} MoE layers were run"
    if bad:
        text += f", {bad} of them wrong"
    sampled = [layer for layer in report.layers if layer.experts < layer.experts_total]
    if sampled:
        text += f"; in {len(sampled)} of them a sample of the experts only ({sampled[0].experts} of"
        text += f" {sampled[0].experts_total})"
    unjudged = sum(len(layer.inconclusive) for layer in report.layers)
    if unjudged:
        text += f"; {count(unjudged, 'expert')} could not be judged"
    return f"{text}."


def _facts(report: SmokeReport) -> dict[str, str]:
    backend = report.backend
    seconds = sum(layer.seconds for layer in report.layers)
    peak_nbytes = max((layer.peak_nbytes for layer in report.layers), default=0)
    return {
        "Backend": f"{backend.name}" + (" (the real kernel)" if backend.real_kernel else ""),
        "Device": backend.device,
        "Versions": ", ".join(f"{name} {version}" for name, version in backend.versions.items()),
        "Reference": f"computed from the {report.reference} tensors",
        "Time": f"{seconds:.1f} s, reading included"
        + (f"; {peak_nbytes / 1e9:.2f} GB on the device" if peak_nbytes else ""),
    }


def _least(values: Iterable[float]) -> float:
    """Return the smallest value, NaN if one is NaN: it is the worst of all."""
    found = list(values)
    return math.nan if not found or any(map(math.isnan, found)) else min(found)


def _most(values: Iterable[float]) -> float:
    """Return the largest value, NaN if one is NaN: it is the worst of all."""
    found = list(values)
    return math.nan if not found or any(map(math.isnan, found)) else max(found)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.4g}"
