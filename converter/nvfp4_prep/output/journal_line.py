"""One line of the journal as text: a JSON object with a checksum of its own, so that a damaged line is noticed."""

from __future__ import annotations

import enum
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, check_bounds

__all__ = ["JournalLine", "LineState", "read_line", "tail_may_be_verdict", "to_line"]

_CHECKSUM = "checksum"
_NO_VERDICT = ("identity", "file", "made")
_BELIEVED = (*_NO_VERDICT, "verdict")
_TAIL_OF_ANOTHER = re.compile(rb'\{"checksum": \d+, "(?:digests|facts|file|identity|made)"')


class LineState(enum.Enum):
    """State of a line."""

    SOUND = enum.auto()
    """It has the right checksum."""
    UNSIGNED = enum.auto()
    """It has none, as earlier releases wrote it."""
    DAMAGED = enum.auto()
    """It is not what was written."""


@dataclass(frozen=True)
class JournalLine:
    """A line as it was read.

    Attributes:
        value: its object; of a line that is not sound, only the keys by which a run gets more careful: which run this
            is, which file is its own and has to be made again, and that a verdict was found. ``None`` if the line is
            not an object of bounded depth.
        state: of the line.
    """

    value: dict[str, Any] | None
    state: LineState

    @property
    def may_be_verdict(self) -> bool:
        """Whether it may have been the verdict of a smoke test, which cannot be read any more."""
        return self.state is not LineState.SOUND and not any(key in (self.value or {}) for key in _NO_VERDICT)


def to_line(value: Mapping[str, Any]) -> bytes:
    """Return the line that holds a JSON object; its ``checksum`` is the CRC-32 of the object without it."""
    return json.dumps({**value, _CHECKSUM: _checksum(value)}, sort_keys=True).encode() + b"\n"


def read_line(line: bytes) -> JournalLine:
    """Read what :func:`to_line` returned, or what became of it."""
    try:
        check_bounds(line, MAX_DEPTH)
        value = json.loads(line)
    except (ValueError, RecursionError):
        return JournalLine(None, LineState.DAMAGED)
    if not isinstance(value, dict):
        return JournalLine(None, LineState.DAMAGED)
    state = LineState.DAMAGED if _CHECKSUM in value else LineState.UNSIGNED
    checksum = value.pop(_CHECKSUM, None)
    if checksum == _checksum(value):
        return JournalLine(value, LineState.SOUND)
    return JournalLine({key: value[key] for key in _BELIEVED if key in value}, state)


def tail_may_be_verdict(tail: bytes) -> bool:
    """Return whether a last line that was cut off may have been a verdict: its first key tells, if it is there."""
    return bool(tail) and (b'"verdict"' in tail or _TAIL_OF_ANOTHER.match(tail) is None)


def _checksum(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
