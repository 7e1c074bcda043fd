"""Directories of the repository."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DATA", "ROOT", "SUPPORT"]

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
DATA = ROOT / "tests" / "data"
