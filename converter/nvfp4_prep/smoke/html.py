"""The smoke report as one self-contained HTML page, for somebody who has to sign off a deployment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as escape_html

from nvfp4_prep._util.printable import printable
from nvfp4_prep.output.report_file import REPORT_MARKER
from nvfp4_prep.smoke.chart import error_chart
from nvfp4_prep.smoke.report import ErrorFigures, LayerReport, SmokeReport, StageFigures

__all__ = ["make_page"]

_WORST_EXPERTS = 20

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d5dae1; --paper: #fff; --band: #f4f6f8;
  --good: #1a7f4b; --bad: #b3261e; --bar: #2f6fbb; --floor: #a15c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b3; --line: #38414d; --paper: #14181e;
  --band: #1d232b; --good: #4cc38a; --bad: #ff7b72; --bar: #6ea8fe; --floor: #e0a458; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { max-width: 52rem; margin: .5rem 0; } .soft { color: var(--soft); }
.verdict { border-left: .4rem solid; padding: .6rem 1rem; margin: 1rem 0; background: var(--band); }
.verdict strong { font-size: 1.2rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict.good, .verdict.bad { color: var(--ink); }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict.good strong { color: var(--good); } .verdict.bad strong { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .87rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .45rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); } .bar { stroke: var(--bar); stroke-width: 3; } .dot { fill: var(--bar); }
.wrong .bar { stroke: var(--bad); } .wrong .dot { fill: var(--bad); }
.floor { stroke: var(--floor); stroke-width: 2; } .limit { stroke: var(--bad); stroke-width: 1.5; }
li { margin: .2rem 0; }
"""


def make_page(report: SmokeReport) -> str:
    """The page. It loads nothing from anywhere."""
    title = _escape(f"Fused-MoE smoke run: {report.checkpoint}")
    body = "".join(
        (
            f"<h1>{title}</h1>",
            _verdict(report),
            _facts(report),
            _problems(report.layers),
            "<h2>Relative error of each layer's experts</h2>",
            _CHART_TEXT,
            error_chart(report.layers),
            "<h2>Layers</h2>",
            _layer_table(report.layers),
            f"<h2>Worst {_WORST_EXPERTS} experts</h2>",
            _expert_table(report.layers),
            "<h2>Routings</h2>",
            _routing_table(report.layers),
            _method(report),
        )
    )
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>{REPORT_MARKER}<title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _escape(text: str) -> str:
    """Return text from outside as HTML shows it, without characters that reorder or hide."""
    return escape_html(printable(text))


def _verdict(report: SmokeReport) -> str:
    kind = "good" if report.passed else "bad"
    word = "Passed" if report.passed else "Failed"
    bad = sum(not layer.passed for layer in report.layers)
    covered = f"{len(report.layers)} of {report.layers_total} MoE layers were run"
    if bad:
        covered += f", {bad} of them wrong"
    sampled = [layer for layer in report.layers if layer.experts < layer.experts_total]
    if sampled:
        covered += f"; in {len(sampled)} of them a sample of the experts only ({sampled[0].experts} of"
        covered += f" {sampled[0].experts_total})"
    if report.backend.real_kernel:
        kernel = "FlashInfer's CuteDSL fused-MoE kernel itself ran, the one that serves."
    else:
        kernel = (
            f"FlashInfer's {report.backend.kernel} kernel did NOT run ({report.backend.reason}). The"
            f" {report.backend.name} backend read the same bytes by the published layout and did the same arithmetic."
        )
    source = "" if report.reference == "source" else _RESTORED
    words = "".join(f"<p>{_escape(text)}</p>" for text in (f"{covered}.", kernel))
    return f"<div class='verdict {kind}'><strong>{word}</strong>{words}{source}</div>"


_CHART_TEXT = """<p class='soft'>Bar: smallest to largest over the experts, dot: median. Brown tick: noise floor, the
reference against itself with its sums in another order. Red tick: the largest relative error that rounding of the
intermediate can explain. An error below both is as good as none; zero is drawn at the bottom.</p>"""

_RESTORED = """<p>The source was not at hand: the reference was computed from the prepared tensors turned back. That
checks how the bytes are read, not that they came from the source.</p>"""


def _facts(report: SmokeReport) -> str:
    backend = report.backend
    versions = ", ".join(f"{name} {version}" for name, version in backend.versions.items())
    seconds = sum(layer.seconds for layer in report.layers)
    peak = max((layer.peak_nbytes for layer in report.layers), default=0)
    facts = {
        "Backend": f"{backend.name}" + (" (the real kernel)" if backend.real_kernel else ""),
        "Device": backend.device,
        "Versions": versions,
        "Reference": f"computed from the {report.reference} tensors",
        "Time": f"{seconds:.1f} s, reading included" + (f"; {peak / 1e9:.2f} GB on the device" if peak else ""),
    }
    items = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def _problems(layers: Iterable[LayerReport]) -> str:
    items = "".join(
        f"<li><b>{_escape(layer.name)}</b>: {_escape(problem)}</li>" for layer in layers for problem in layer.problems
    )
    return f"<h2 class='bad'>What is wrong</h2><ul>{items}</ul>" if items else ""


def _layer_table(layers: Sequence[LayerReport]) -> str:
    rows = []
    for layer in layers:
        errors = [figure.errors for figure in layer.figures]
        rows.append(
            (
                f"{layer.index}",
                _mark(layer.passed),
                f"{layer.experts} of {layer.experts_total}",
                f"{min(figure.cosine for figure in errors):.6f}",
                _number(max(figure.relative for figure in errors)),
                _number(layer.noise.relative),
                _number(max(figure.relative_limit for figure in errors)),
                _number(max(figure.worst for figure in layer.figures)),
                f"{sum(figure.unwritten for figure in errors)}",
                f"{layer.dirty_padding + layer.padded_outputs_not_zero}",
                f"{len(layer.wrong_scalars)}",
                f"{layer.amplitude:.3g} / {layer.intermediate_range:.2g}",
                f"{layer.seconds:.1f}",
            )
        )
    head = (
        "Layer",
        "",
        "Experts",
        "Lowest cosine",
        "Largest rel. error",
        "Noise floor",
        "Rel. limit",
        "Worst element ÷ tolerance",
        "Unwritten",
        "Padding",
        "Scalars",
        "Token / interm. range",
        "s",
    )
    return _table(head, rows)


def _expert_table(layers: Sequence[LayerReport]) -> str:
    found = [(layer, figure) for layer in layers for figure in layer.figures]
    found.sort(key=lambda pair: -pair[1].worst)
    rows = [
        (
            f"layer {layer.index}, expert {figure.expert}",
            _mark(not figure.problems),
            *_error_cells(figure.errors),
            *_stage_cells(figure.stages),
        )
        for layer, figure in found[:_WORST_EXPERTS]
    ]
    return _table(("Expert", "", *_ERROR_HEAD, "GEMM 1 worst", "Misrounded", "GEMM 2 worst"), rows)


def _stage_cells(stages: StageFigures | None) -> tuple[str, str, str]:
    if stages is None:
        return ("not shown", "not shown", "not shown")
    return (_number(stages.first.worst), f"{stages.misrounded}", _number(stages.second.worst))


def _routing_table(layers: Sequence[LayerReport]) -> str:
    rows = [
        (
            f"layer {layer.index}: {case.name}",
            _mark(case.errors.passed),
            f"{case.tokens} x {case.top_k}",
            f"{case.busiest}",
            f"{case.idle}",
            *_error_cells(case.errors),
        )
        for layer in layers
        for case in layer.cases
    ]
    return _table(("Routing", "", "Tokens x k", "Most of one expert", "Idle experts", *_ERROR_HEAD), rows)


_ERROR_HEAD = ("Cosine", "Rel. error", "Rel. limit", "Worst ÷ tolerance", "Worst ÷ rms", "Unwritten", "Reference rms")


def _error_cells(errors: ErrorFigures) -> tuple[str, ...]:
    return (
        f"{errors.cosine:.6f}",
        _number(errors.relative),
        _number(errors.relative_limit),
        _number(errors.worst),
        _number(errors.worst_of_rms),
        f"{errors.unwritten}",
        _number(errors.reference_rms),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{_escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _mark(passed: bool) -> str:
    return "<span class='good'>✓</span>" if passed else "<span class='bad'>✗ wrong</span>"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.4g}"


def _method(report: SmokeReport) -> str:
    reference = "source" if report.reference == "source" else "prepared tensors turned back"
    return _METHOD.format(backend=report.backend.name, reference=reference)


_METHOD = """<h2>How it was judged</h2>
<p>Random bfloat16 tokens were quantized to NVFP4 and sent through the prepared layer by the {backend} backend. The
reference decodes the {reference} and does the same arithmetic in float32: alpha = scale_2 * input_scale, the model's
activation, the intermediate quantized to NVFP4 with e4m3 block scales, the down projection, the router's weights.
Outputs were NaN before the run, so an element that nothing wrote counts as unwritten. Three routings: every expert
alone, one expert without tokens, one expert with all tokens.</p>
<p>Two right implementations differ in the order of their additions and in approximate functions. Where that can decide
the rounding of an intermediate value, its effect on each output element is added to that element's tolerance;
everywhere else the tolerance is about 10<sup>-6</sup> of the output (plus bfloat16 rounding where the kernel writes
bfloat16). One element beyond its tolerance fails the layer. A backend that shows its intermediate is also judged stage
by stage, where no rounding is in doubt: the first GEMM, the quantization, and the second GEMM from the intermediate
that it made; there a single wrong code shows. The noise floor is measured on some experts of each layer: the reference
against itself, sums in another order.</p>
"""
