"""The report of a smoke run, as plain values: printed, written as JSON and shown as a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nvfp4_prep._util.extremes import least, most
from nvfp4_prep.smoke.figures import CaseFigures, ErrorFigures, ExpertFigures, NoiseFloor

__all__ = ["BackendFacts", "LayerReport", "SmokeReport"]

_NOTED_EXPERTS = 8
"""Experts of a layer that are named one by one where they could not be judged."""


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: module path of the experts.
        index: the model's layer number.
        experts, experts_total: how many were run, and how many there are.
        amplitude: largest token value over the calibrated maximum (input scale * 448 * 6).
        intermediate_range: largest intermediate value over what its scale can hold; above 1 saturates.
        dirty_padding: padding bytes that are not zero.
        wrong_scalars: scalars that differ from the source's, in words.
        seconds: wall time, reading included.
        peak_nbytes: device memory at the peak; 0 on the CPU.
    """

    name: str
    index: int
    experts: int
    experts_total: int
    amplitude: float
    intermediate_range: float
    cases: tuple[CaseFigures, ...]
    figures: tuple[ExpertFigures, ...]
    noise: NoiseFloor
    padded_outputs_not_zero: int
    dirty_padding: int
    wrong_scalars: tuple[str, ...]
    seconds: float = 0.0
    peak_nbytes: int = 0

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, in words; empty if the layer passed."""
        found = [f"scalars: {text}" for text in self.wrong_scalars]
        if self.dirty_padding:
            found.append(f"padding: {self.dirty_padding} padding bytes are not zero")
        if self.padded_outputs_not_zero:
            found.append(f"padding: {self.padded_outputs_not_zero} padded outputs are not zero")
        for figure in ("outputs", "first GEMM", "quantization", "second GEMM"):
            bad = [expert for expert in self.figures if any(text.startswith(figure) for text in expert.problems)]
            if bad:
                worst = max(bad, key=lambda expert: expert.worst)
                text = next(text for text in worst.problems if text.startswith(figure))
                count = f"{len(bad)} of {len(self.figures)} experts wrong"
                found.append(f"{figure}: {count}, expert {worst.expert}{text[len(figure) :]}")
        found += [f"routing: {case.name}: {case.errors.description}" for case in self.cases if not case.errors.right]
        return tuple(found)

    @property
    def inconclusive(self) -> dict[int, str]:
        """Experts that could not be judged, or not everywhere, with the reason."""
        return {figure.expert: figure.inconclusive for figure in self.figures if figure.inconclusive}

    @property
    def notes(self) -> tuple[str, ...]:
        """Everything that could not be judged, in words: a fact about what was given, not about the bytes."""
        experts = list(self.inconclusive.items())
        found = [f"expert {expert}: {reason}" for expert, reason in experts[:_NOTED_EXPERTS]]
        if experts[_NOTED_EXPERTS:]:
            found.append(f"{len(experts) - _NOTED_EXPERTS} more experts: the same or alike")
        if not experts:  # or they are the reason
            reasons = ((case.name, case.errors.inconclusive) for case in self.cases)
            found += [f"routing: {name}: {reason}" for name, reason in reasons if reason]
        if self._noisy:
            found.append(f"sums in another order leave the tolerance of the reference, {self.noise.worst:.3g} times")
        return tuple(found)

    @property
    def compared(self) -> bool:
        """Whether the outputs of at least one expert were judged."""
        return not self._noisy and len(self.inconclusive) < len(self.figures)

    @property
    def _noisy(self) -> bool:
        return not self.noise.worst <= 1.0

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def errors(self) -> tuple[ErrorFigures, ...]:
        """Of the outputs of every expert and every routing."""
        return (*(figure.errors for figure in self.figures), *(case.errors for case in self.cases))

    @property
    def worst_of_tolerance(self) -> float:
        """Largest error of one element in units of its tolerance, over experts, their stages and routings."""
        return most([*(figure.worst for figure in self.figures), *(case.errors.worst for case in self.cases)])

    @property
    def worst_expert(self) -> ExpertFigures:
        """The expert with the largest error in units of its tolerance."""
        return max(self.figures, key=lambda figure: figure.worst)


@dataclass(frozen=True)
class BackendFacts:
    """The implementation that ran, and where.

    Attributes:
        name: ``flashinfer``, ``triton`` or ``torch``.
        real_kernel: whether it was the CuteDSL kernel that a server runs.
        reason: why no better backend ran; empty if this is the best.
        device: GPU or processor.
        versions: library to version.
        kernel: the one that a server runs with this layout.
    """

    name: str
    real_kernel: bool
    reason: str
    device: str
    versions: dict[str, str]
    kernel: str


@dataclass(frozen=True)
class SmokeReport:
    """A whole smoke run.

    Attributes:
        checkpoint: the prepared checkpoint's source, as its manifest names it.
        reference: ``source`` or ``restored``: what the reference was computed from.
        layers_total: MoE layers of the checkpoint; ``layers`` may be a sample.
    """

    checkpoint: str
    reference: str
    backend: BackendFacts
    layers_total: int
    layers: tuple[LayerReport, ...]

    def __repr__(self) -> str:
        return (
            f"SmokeReport({self.checkpoint!r:.80}, passed={self.passed}, backend={self.backend.name!r},"
            f" layers={len(self.layers)} of {self.layers_total})"
        )

    @property
    def passed(self) -> bool:
        """Whether every layer that was run passed; a run over no layer proves nothing."""
        return bool(self.layers) and all(layer.passed for layer in self.layers)

    @property
    def result(self) -> str:
        """``failed`` if anything is wrong; ``inconclusive`` if no expert could be judged; else ``passed``."""
        if not self.passed:
            return "failed"
        return "passed" if any(layer.compared for layer in self.layers) else "inconclusive"

    @property
    def lowest_cosine(self) -> float:
        """Over all experts and routings."""
        return least(errors.cosine for layer in self.layers for errors in layer.errors)

    @property
    def largest_relative_error(self) -> float:
        """Over all experts and routings."""
        return most(errors.relative for layer in self.layers for errors in layer.errors)

    @property
    def worst_of_tolerance(self) -> float:
        """Largest error of one element in units of its tolerance, over all experts, their stages and routings."""
        return most(layer.worst_of_tolerance for layer in self.layers)

    def summary(self) -> dict[str, Any]:
        """Return the short form for a manifest: what ran and the worst figures."""
        return {
            "check": "fused-MoE smoke test",
            "result": self.result,
            "inconclusive_experts": sum(len(layer.inconclusive) for layer in self.layers),
            "backend": self.backend.name,
            "real_kernel": self.backend.real_kernel,
            "why_not_better": self.backend.reason,
            "device": self.backend.device,
            "versions": self.backend.versions,
            "reference": self.reference,
            "layers": len(self.layers),
            "layers_total": self.layers_total,
            "experts": sum(len(layer.figures) for layer in self.layers),
            "lowest_cosine": self.lowest_cosine,
            "largest_relative_error": self.largest_relative_error,
            "worst_element_of_tolerance": self.worst_of_tolerance,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value with everything."""
        return {
            **asdict(self),
            "passed": self.passed,
            "problems": {layer.name: list(layer.problems) for layer in self.layers if layer.problems},
            "inconclusive": {
                layer.name: {str(expert): reason for expert, reason in layer.inconclusive.items()}
                for layer in self.layers
                if layer.inconclusive
            },
        }
