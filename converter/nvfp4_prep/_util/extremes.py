"""Smallest and largest of measured values, of which NaN is the worst."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["least", "most"]


def least(values: Iterable[float]) -> float:
    """Return the smallest value; NaN if one is NaN, or if there is none."""
    found = list(values)
    return math.nan if not found or any(map(math.isnan, found)) else min(found)


def most(values: Iterable[float]) -> float:
    """Return the largest value; NaN if one is NaN, or if there is none."""
    found = list(values)
    return math.nan if not found or any(map(math.isnan, found)) else max(found)
