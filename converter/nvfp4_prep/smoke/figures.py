"""Figures of a smoke run: errors against the reference, an expert at a time, and what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CaseFigures", "ErrorFigures", "ExpertFigures", "NoiseFloor", "StageFigures"]

RELATIVE_LIMIT = 0.1
"""Above this the intermediate is so often between two codes that a comparison would prove little."""
NEARLY_ZERO = 1e-25
"""Outputs below this are nothing beside others of bfloat16 activations, and float32 products underflow on the way."""


@dataclass(frozen=True)
class ErrorFigures:
    """Errors of one set of outputs against the reference.

    Attributes:
        cosine: cosine between outputs and reference.
        relative: |error| / |reference|, Euclidean norms.
        relative_limit: |tolerance| / |reference|: the largest relative error that rounding can explain.
        worst: largest error of one element in units of its own tolerance; above 1 is wrong.
        worst_of_rms: that element's error over the reference's root mean square.
        unwritten: elements that are not finite where the reference is; the output is NaN before the run.
        reference_rms: root mean square of the reference's finite elements.
        undefined: elements whose reference is not finite: nothing is compared there.
    """

    cosine: float
    relative: float
    relative_limit: float
    worst: float
    worst_of_rms: float
    unwritten: int
    reference_rms: float
    undefined: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong, and the tolerance means something."""
        return self.right and self.meaningful

    @property
    def right(self) -> bool:
        """Whether everything that the reference says was written and lies within its tolerance."""
        return self.unwritten == 0 and self.worst <= 1.0

    @property
    def degenerate(self) -> bool:
        """Whether the reference is zero, or nearly, or not finite: a fact about what was given, not about the bytes."""
        return self.undefined > 0 or self.reference_rms <= NEARLY_ZERO

    @property
    def meaningful(self) -> bool:
        """Whether the reference is away from zero and the tolerance is small against it."""
        return self.inconclusive == ""

    @property
    def inconclusive(self) -> str:
        """Why a right output proves little here; empty if it proves something."""
        if self.undefined:
            return "reference is not finite"
        if self.degenerate:
            return "reference is zero"
        if not self.relative_limit <= RELATIVE_LIMIT:
            return (
                f"values are out of range, so that rounding may change them by {self.relative_limit:.3g} of their size"
            )
        return ""

    @property
    def description(self) -> str:
        """The figures in words, for one who asks what is wrong."""
        if self.unwritten:
            return f"{self.unwritten} output elements not written or not finite"
        return (
            f"worst element {self.worst:.3g} times its tolerance, relative error {self.relative:.3g},"
            f" cosine {self.cosine:.6f}"
        )


@dataclass(frozen=True)
class StageFigures:
    """Figures between tokens and outputs, where a backend shows them. No rounding is in doubt here.

    Attributes:
        first: the first GEMM and the activation, before quantization.
        misrounded: elements of the quantized intermediate that rounding cannot explain.
        second: the second GEMM, from the intermediate that the backend made.
    """

    first: ErrorFigures
    misrounded: int
    second: ErrorFigures


@dataclass(frozen=True)
class ExpertFigures:
    """One expert, from tokens that go to it alone.

    Attributes:
        expert: its number.
        tokens: how many.
        errors: from tokens to outputs.
        doubtful: elements of the intermediate whose rounding is in doubt, so that the outputs' tolerance is wide.
        stages: ``None`` where the backend shows nothing but its outputs.
        zero: a global scale of the source is zero, so that the expert computes zeros: nothing else is right, and that
            its reference is zero proves nothing against it.
    """

    expert: int
    tokens: int
    errors: ErrorFigures
    doubtful: int
    stages: StageFigures | None
    zero: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in words that begin with the figure that says so."""
        found = [] if self.errors.right else [f"outputs: {self.errors.description}"]
        if self.stages is not None:
            if not self.stages.first.right:
                found.append(f"first GEMM: {self.stages.first.description}")
            if self.stages.misrounded:
                found.append(f"quantization: {self.stages.misrounded} intermediate values wrong")
            if not self.stages.second.right:
                found.append(f"second GEMM: {self.stages.second.description}")
        return tuple(found)

    @property
    def inconclusive(self) -> str:
        """Why what is right proves little: nothing to compare, or not everywhere, or all is within a wide tolerance.

        It follows from the reference alone, so it never says anything about the bytes.
        """
        seen = [self.errors] if self.stages is None else [self.errors, self.stages.first, self.stages.second]
        if self.zero:
            return "reference is zero"
        return next(filter(None, (figures.inconclusive for figures in seen)), "")

    @property
    def worst(self) -> float:
        """Largest error of any figure in units of its tolerance."""
        figures = [self.errors.worst]
        if self.stages is not None:
            figures += [self.stages.first.worst, self.stages.second.worst]
        return max(map(_order, figures))


@dataclass(frozen=True)
class CaseFigures:
    """One routing.

    Attributes:
        name: what is special about it.
        top_k: experts a token.
        tokens: how many.
        busiest: most tokens of one expert.
        idle: experts without a token.
    """

    name: str
    top_k: int
    tokens: int
    busiest: int
    idle: int
    errors: ErrorFigures


@dataclass(frozen=True)
class NoiseFloor:
    """The reference against itself with its sums in another order, on some experts.

    Attributes:
        experts: how many.
        relative: largest |difference| / |reference| of an expert.
        worst: largest difference of one element in units of its tolerance.
    """

    experts: int
    relative: float
    worst: float


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value
