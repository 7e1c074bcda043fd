"""Errors of outputs against a reference, in units of what may differ."""

from __future__ import annotations

import math

import torch

from nvfp4_prep.smoke.figures import ErrorFigures

__all__ = ["compare", "in_tolerances"]


def compare(out: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor) -> ErrorFigures:
    """Return the figures of outputs against a reference, all float32 of one shape."""
    defined = want.isfinite()
    finite = out.isfinite() | ~defined
    want = torch.where(defined, want, 0.0)
    known = torch.where(out.isfinite() & defined, out, 0.0)
    # products below the smallest normal float32 are rounded or flushed as each backend likes
    tolerance = torch.where(defined, tolerance, 0.0) + torch.finfo(torch.float32).tiny
    # a tolerance that overflowed on the way bounds nothing, and the figures say so
    tolerance = torch.where(tolerance.isnan(), math.inf, tolerance)
    error = (known - want).abs()
    worst = torch.where(finite, in_tolerances(error, tolerance), math.inf)
    at = int(worst.argmax())
    # squares of float32 values overflow and underflow in float32
    size, off, bound = (float(values.double().norm()) for values in (want, error, tolerance))
    rms = size / math.sqrt(max(1, want.numel()))
    return ErrorFigures(
        cosine=_cosine(known, want),
        relative=off / max(size, 1e-30),
        relative_limit=bound / max(size, 1e-30),
        worst=float(worst.flatten()[at]),
        worst_of_rms=float(error.flatten()[at]) / max(rms, 1e-30),
        unwritten=int((~finite).sum()),
        reference_rms=rms,
        undefined=int((~defined).sum()),
    )


def in_tolerances(error: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """Return the error in units of the tolerance; an error of 0 passes even where nothing is tolerated."""
    return torch.where(error == 0, 0.0, error / tolerance)


def _cosine(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the cosine, at most 1 though float32 rounding may pass it, or NaN; 1 where both are exactly zero."""
    if not bool(outputs.any()) and not bool(reference.any()):
        return 1.0
    return float(
        torch.nn.functional.cosine_similarity(outputs.double().flatten(), reference.double().flatten(), dim=0).clamp(
            max=1.0
        )
    )
