"""Errors that each policy for differing gate and up scales makes, as sums that experts add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["PolicyErrors"]


class PolicyErrors(NamedTuple):
    """Distances of dequantized gate and up weights from the source's under each policy; sums over experts add up.

    Attributes:
        source: sum of the squares of the source's dequantized weights, gate and up.
        reconcile, vllm: sum of the squared differences to them under that policy.
    """

    source: float
    reconcile: float
    vllm: float

    @classmethod
    def total(cls, parts: Iterable[tuple[float, float, float]]) -> PolicyErrors:
        """Return the sum over experts, the same in whatever order they come."""
        source, reconcile, vllm = zip(*parts, strict=True) if (parts := list(parts)) else ((), (), ())
        return cls(math.fsum(source), math.fsum(reconcile), math.fsum(vllm))

    def relative(self) -> dict[str, float]:
        """Return relative error ``|W - W_source| / |W_source|`` (Frobenius norm) by policy, to six digits.

        ``source`` is the error of serving gate and up with their own scales, which the kernel cannot: 0 by definition.
        """
        size = self.source or 1.0
        return {
            "source": 0.0,
            "reconcile": float(f"{math.sqrt(self.reconcile / size):.6g}"),
            "vllm": float(f"{math.sqrt(self.vllm / size):.6g}"),
        }
