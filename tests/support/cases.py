"""Cases of a parametrized test: a few for every run, the others for ``make test``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["slow_after"]


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Mark all but the first ``count`` cases slow; a tuple is a case of several arguments."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] if n >= count else []) for n, case in enumerate(values)]
