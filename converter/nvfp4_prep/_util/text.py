"""Numbers and long values as people read them. GB is 10^9 bytes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

__all__ = ["and_more", "bounded", "count", "first_of", "format_duration", "format_nbytes", "spans"]


def bounded(text: str, limit: int) -> str:
    """Return a text of at most ``limit`` characters and a few: its beginning, how much is left out, and its end."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail]}… ({len(text) - limit} characters left out) …{text[-tail:]}"


def format_nbytes(nbytes: float) -> str:
    """Return a size with its unit: ``591.02 GB``, ``24.80 MB``, ``512 B``."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds: ``1:02:03`` or ``2:03``; below ten seconds ``1.3 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: int, what: str) -> str:
    """Return a number with its noun: ``1 file``, ``2 files``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def first_of(names: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """Return the first names, at most 200 characters of each, and how many others there are: ``a, b and 7 more``."""
    known = [*names]
    others = f" and {len(known) - most} more" if known[most:] else ""
    return separator.join(bounded(str(name), 200) for name in known[:most]) + others


def and_more(number: int, what: str) -> str:
    """Return how many others there are, to be set behind the first: `` (and 7 more problems)``; empty for none."""
    return f" (and {count(number, f'more {what}')})" if number else ""


def spans(numbers: Iterable[int]) -> str:
    """Return numbers, given in any order, as ranges: ``1-3,7`` for 1, 2, 3 and 7; empty for none."""
    known = sorted(set(numbers))
    if not known:
        return ""
    starts = [known[0], *(b for a, b in pairwise(known) if b != a + 1)]
    ends = [*(a for a, b in pairwise(known) if b != a + 1), known[-1]]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))
