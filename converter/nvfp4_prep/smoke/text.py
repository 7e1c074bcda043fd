"""The smoke report for people at a terminal."""

from __future__ import annotations

from nvfp4_prep._util.printable import join_lines
from nvfp4_prep._util.text import count
from nvfp4_prep.smoke.report import LayerReport, SmokeReport

__all__ = ["layer_line", "smoke_text"]


def smoke_text(report: SmokeReport) -> str:
    """Return what ran, whether it passed, the worst figures and every problem."""
    lines = [f"WRONG {layer.name}: {problem}" for layer in report.layers for problem in layer.problems]
    origin = "SOURCE" if report.reference == "source" else "checkpoint"
    lines += [
        f"note {layer.name}: {note} (in the {origin}): not judged" for layer in report.layers for note in layer.notes
    ]
    backend = report.backend
    if backend.real_kernel:
        lines.append(f"smoke test: FlashInfer's CuteDSL fused-MoE kernel itself, on {backend.device}")
    else:
        lines.append(
            f"smoke test: {backend.name} backend on {backend.device}; the real {backend.kernel} kernel did NOT run"
            f" ({backend.reason})"
        )
    if report.reference == "restored":
        lines.append("reference: the prepared tensors, inverted (no source was given)")
    figures = [figure for layer in report.layers for figure in layer.figures]
    total = sum(layer.experts_total for layer in report.layers)
    lines.append(
        f"smoke test {'FAILED' if report.result == 'failed' else report.result}:"
        f" {len(report.layers)} of {count(report.layers_total, 'layer')},"
        f" {len(figures)} of their {count(total, 'expert')}"
        + (
            f", min cosine {report.lowest_cosine:.6f}, max error {report.worst_of_tolerance:.4g} of tolerance"
            if figures
            else ""
        )
    )
    if report.result == "inconclusive":
        lines.append(
            "nothing is wrong, but no expert could be judged by its outputs; the cause is the values in the"
            f" {origin}. Every byte is compared by nvfp4-prep verify --source"
        )
    return join_lines(lines)


def layer_line(layer: LayerReport, number: int, total: int) -> str:
    """Return the line of progress for one layer."""
    state = "WRONG" if not layer.passed else "ok" if layer.compared else "inconclusive"
    return (
        f"smoke test {number}/{total}: {layer.name}: {state}, {count(layer.experts, 'expert')}, max error"
        f" {layer.worst_of_tolerance:.4g} of tolerance, {layer.seconds:.1f} s"
    )
