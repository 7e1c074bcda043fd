"""JSON from untrusted files: size, depth and number of values are bounded before anything is built from the text."""

from __future__ import annotations

import json
import re
from itertools import accumulate, chain
from typing import Any

from nvfp4_prep.errors import NvfpPrepError

__all__ = ["MAX_DEPTH", "MAX_VALUES", "SOURCE_MAX_DEPTH", "JsonBounds", "check_bounds", "dump_json", "parse_json"]

SOURCE_MAX_DEPTH = 100
"""Deepest nesting accepted in a source's configs and index."""
MAX_DEPTH = 200
"""Deepest nesting accepted in files that embed a source's configs: manifest, prepared config, journal."""
MAX_VALUES = 8_000_000
"""Most values in one file. The index of Kimi-K2.5 has 280,000; a value costs about 100 bytes of memory."""

_STRING = re.compile(rb'"[^"]*"?')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}


class JsonBounds(ValueError):
    """A text that exceeds a bound: ``what``, the bound as ``expected`` and the value as ``actual``."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(f"{what}: {actual}, at most {expected}")
        self.what, self.expected, self.actual = what, expected, actual


def parse_json(
    raw: bytes,
    where: str,
    error: type[NvfpPrepError],
    *,
    max_depth: int = SOURCE_MAX_DEPTH,
    next_step: str | None = None,
) -> Any:
    """Return the value of a JSON text whose size the caller has bounded.

    Args:
        raw: UTF-8 text.
        where: the file, for the error.
        error: type of the error to raise.
        max_depth: deepest nesting of lists and objects that is accepted.
        next_step: what the user can do about a text that cannot be read.

    Raises:
        NvfpPrepError: of type ``error``, if the text is not JSON, is not UTF-8, or exceeds a bound.
    """
    try:
        check_bounds(raw, max_depth)
        return json.loads(raw.decode("utf-8"))  # of bytes it would take UTF-16 and a byte order mark too
    except JsonBounds as problem:
        raise error(
            problem.what,
            where=where,
            expected=f"at most {problem.expected}",
            actual=problem.actual,
            next_step=next_step,
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"is not valid JSON ({problem})", where=where, next_step=next_step) from problem


def dump_json(
    value: Any, most_nbytes: int, *, indent: int, ensure_ascii: bool = True, sort_keys: bool = False
) -> bytes:
    """Return the text of a JSON value and a newline; indentation may make it a hundred times larger than it was.

    Half a surrogate pair, which has no UTF-8, is escaped.

    Raises:
        JsonBounds: before the text exceeds ``most_nbytes``.
    """
    encoder = json.JSONEncoder(indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
    pieces, nbytes = [], 0
    for piece in chain(encoder.iterencode(value), "\n"):
        pieces.append(piece.encode("utf-8", "backslashreplace"))
        nbytes += len(pieces[-1])
        if nbytes > most_nbytes:
            raise JsonBounds("is too large", f"{most_nbytes:,} bytes", "more")
    return b"".join(pieces)


def check_bounds(raw: bytes, max_depth: int) -> None:
    """Raise :class:`JsonBounds` if a JSON text nests deeper than ``max_depth`` or has over :data:`MAX_VALUES` values.

    A linear scan without recursion. For text that is not JSON the figures mean nothing, but parsing fails then.
    """
    # Escapes go first, so that no search of a string's end runs through the whole text more than once.
    outside = _STRING.sub(b"", raw.replace(rb"\\", b"").replace(rb"\"", b""))
    opened = outside.count(b"[") + outside.count(b"{")
    values = outside.count(b",") + opened + 1
    if values > MAX_VALUES:
        raise JsonBounds("has too many JSON values", f"{MAX_VALUES:,}", f"{values:,}")
    if outside.count(b"]") + outside.count(b"}") > opened:
        return  # not JSON: the parser stops at the first bracket too many
    steps = map(_STEP.__getitem__, outside.translate(None, delete=_NO_BRACKETS))
    deepest = max(accumulate(steps), default=0)
    if deepest > max_depth:
        raise JsonBounds("is nested too deep", f"{max_depth} levels", f"{deepest} levels")
