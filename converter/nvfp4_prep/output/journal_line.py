"""One line of the journal as text: a JSON object with a checksum of its own, so that a damaged line is noticed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, check_bounds

__all__ = ["parse_line", "to_line"]

_CHECKSUM = "checksum"
_BELIEVED = ("identity", "file", "made", "verdict")


def to_line(value: Mapping[str, Any]) -> bytes:
    """Return the line that holds a JSON object; its ``checksum`` is the CRC-32 of the object without it."""
    return json.dumps({**value, _CHECKSUM: _checksum(value)}, sort_keys=True).encode() + b"\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object of :func:`to_line`, or ``None`` if the line is not an object of bounded depth.

    Of an object whose checksum is wrong or missing, only the keys remain by which a run gets more careful: which run
    this is, which file is its own and has to be made again, and that a verdict was found.
    """
    try:
        check_bounds(line, MAX_DEPTH)
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    checksum = value.pop(_CHECKSUM, None)
    if checksum != _checksum(value):
        return {key: value[key] for key in _BELIEVED if key in value}
    return value


def _checksum(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
