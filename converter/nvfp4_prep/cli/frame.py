"""The frame of every JSON object on stdout; imports nothing that takes time, for an interrupt prints it too."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nvfp4_prep._version import __version__

__all__ = ["SCHEMA_VERSION", "framed", "start_clock"]

SCHEMA_VERSION = 1
"""Of all values of ``--json``: within a version keys may be added, none is renamed, removed or changed in meaning."""

_began_s = [time.monotonic()]


def start_clock() -> None:
    """Begin to count the seconds of a command."""
    _began_s[0] = time.monotonic()


def framed(value: Mapping[str, Any], command: str | None = None) -> dict[str, Any]:
    """Return a command's value with what all commands say: schema and tool version, command, elapsed seconds."""
    return {
        **value,
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "command": command,
        "elapsed_s": round(time.monotonic() - _began_s[0], 3),
    }
