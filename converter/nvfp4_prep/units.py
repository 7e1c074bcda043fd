"""Numbers as people read them. GB is 10^9 bytes."""

from __future__ import annotations

__all__ = ["format_duration", "format_nbytes"]


def format_nbytes(nbytes: float) -> str:
    """``591.02 GB``, ``24.8 MB``, ``512 B``."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
