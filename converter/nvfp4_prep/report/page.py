"""A verification and a smoke run as one self-contained HTML page, for a person who has to approve a deployment."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_prep._util.extremes import least, most
from nvfp4_prep._util.layer_strip import layer_strip
from nvfp4_prep._util.printable import printable
from nvfp4_prep._util.text import count, format_nbytes
from nvfp4_prep.output.report_file import REPORT_MARKER, write_report
from nvfp4_prep.report.chart import error_chart
from nvfp4_prep.report.evidence import Evidence, collect_evidence, manifest_digest
from nvfp4_prep.report.verdict import judge

if TYPE_CHECKING:  # these import torch, for which --help must not wait
    from nvfp4_prep.commands.verify_report import VerifyReport
    from nvfp4_prep.prepared.manifest import Manifest
    from nvfp4_prep.smoke.report import SmokeReport

__all__ = ["Subject", "make_page", "write_page"]

_TEMPLATES = ("page", "style", "macros", "verification", "smoke")
_WORST_EXPERTS = 20


@dataclass(frozen=True)
class Subject:
    """The subject of a page.

    Attributes:
        path: the checkpoint, as it was named.
        manifest: its manifest, where one was read.
        verification: its verification, where one ran.
        smoke: its smoke run, where one ran.
        why_no_smoke: the reason why none did.
        manifest_sha256: digest of the manifest's bytes; by default the verification's, or that of the file at ``path``.
    """

    path: str
    manifest: Manifest | None = None
    verification: VerifyReport | None = None
    smoke: SmokeReport | None = None
    why_no_smoke: str = "not asked for (--smoke)"
    manifest_sha256: str = ""

    @property
    def evidence_sha256(self) -> str:
        """Digest of the manifest that the findings are about."""
        known = self.manifest_sha256 or (self.verification.manifest_sha256 if self.verification else "")
        return known or manifest_digest(self.path)


def write_page(path: Path, subject: Subject, *directories: str | Path | None, command: str = "") -> None:
    """Write the page whole or not at all; errors as of :func:`~nvfp4_prep.output.report_file.write_report`.

    Args:
        path: what the user named.
        subject: what is shown.
        directories: checkpoints that nothing is added to.
        command: what was typed.
    """
    write_report(path, make_page(subject, command), *directories)


def make_page(subject: Subject, command: str = "") -> str:
    """Return the page. It loads nothing from anywhere."""
    import jinja2  # comes with torch, which requires it; imported here because --help has no use for it
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": _number,
        "cosine": "{:.6f}".format,
        "least": least,
        "most": most,
        "nbytes": format_nbytes,
    }
    smoke = subject.smoke
    verdict = judge(subject.verification, smoke)
    evidence = collect_evidence(command, subject.evidence_sha256)
    strip = () if subject.verification is None else subject.verification.layer_cells
    return environment.get_template("page").render(
        marker=Markup(REPORT_MARKER),
        title=_title(subject),
        subject=subject,
        verdict=verdict,
        facts=_facts(subject, evidence),
        strip=Markup(layer_strip(strip)) if strip else "",
        **({} if smoke is None else _smoke_values(smoke)),
    )


def _template(name: str) -> str | None:
    if name not in _TEMPLATES:
        return None
    return resources.files("nvfp4_prep.report").joinpath(f"{name}.html.j2").read_text(encoding="utf-8")


def _shown(value: object) -> object:
    """Return text from outside without characters that reorder or hide; the template escapes it for HTML."""
    return printable(value) if type(value) is str else value


def _title(subject: Subject) -> str:
    what = "Verification" if subject.verification is not None else "Fused-MoE smoke test"
    return f"{what}: {subject.path}"


def _smoke_values(smoke: SmokeReport) -> dict[str, Any]:
    figures = [(layer, figure) for layer in smoke.layers for figure in layer.figures]
    figures.sort(key=lambda pair: -pair[1].worst)
    off = [pair for pair in figures if pair[1].worst > 0 or pair[1].problems]
    return {
        "coverage": _coverage(smoke),
        "smoke_facts": _smoke_facts(smoke),
        "problems": [(layer.name, problem) for layer in smoke.layers for problem in layer.problems],
        "notes": [(layer.name, note) for layer in smoke.layers for note in layer.notes],
        "chart": error_chart(smoke.layers),
        "worst": off[:_WORST_EXPERTS],
        "exact_experts": len(figures) - len(off),
    }


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


def _facts(subject: Subject, evidence: Evidence) -> dict[str, str]:
    manifest = subject.manifest
    servers = (f"{name} {evidence.versions[name] or 'not installed'}" for name in ("vllm", "sglang"))
    apart = ("nvfp4-prep", "vllm", "sglang")
    others = (f"{name} {version}" for name, version in evidence.versions.items() if version and name not in apart)
    made = {}
    if manifest is not None:
        revision = f" at {manifest.revision}" if manifest.revision else ""
        layers = f"{count(len(manifest.layers), 'MoE layer')}, {count(len(manifest.files), 'file')}"
        options = ", ".join(f"{name} {value}" for name, value in manifest.options.to_dict().items())
        made = {
            "Source": f"{manifest.source}{revision}",
            "Converted by": f"nvfp4-prep {manifest.tool_version} ({options})",
            "Contents": f"{layers}, {format_nbytes(sum(file.nbytes for file in manifest.files.values()))}",
        }
    return {
        "Checkpoint": subject.path,
        "Manifest": f"sha256 {evidence.manifest_sha256}" if evidence.manifest_sha256 else "not written",
        **made,
        "Report by": f"nvfp4-prep {evidence.versions['nvfp4-prep']}",
        "Date": evidence.date,
        "Host": f"{evidence.host} ({evidence.system})",
        "Command": evidence.command or "a call from Python",
        "Servers": ", ".join(servers),
        "Packages": ", ".join(others),
    }


def _smoke_facts(report: SmokeReport) -> dict[str, str]:
    backend = report.backend
    seconds = sum(layer.seconds for layer in report.layers)
    peak_nbytes = max((layer.peak_nbytes for layer in report.layers), default=0)
    return {
        "Backend": f"{backend.name}" + (" (the real kernel)" if backend.real_kernel else ""),
        "Device": backend.device,
        "Versions": ", ".join(f"{name} {version}" for name, version in backend.versions.items()) or "none reported",
        "Reference": f"computed from the {report.reference} tensors",
        "Lowest cosine": f"{report.lowest_cosine:.6f}",
        "Largest rel. error": _number(report.largest_relative_error),
        "Worst element": f"{_number(report.worst_of_tolerance)} of its tolerance, over all experts and routings",
        "Time": f"{seconds:.1f} s, reading included"
        + (f"; {peak_nbytes / 1e9:.2f} GB on the device" if peak_nbytes else ""),
    }


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.4g}"
