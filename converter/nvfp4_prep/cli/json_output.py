"""JSON for stdout: strict, on one line."""

from __future__ import annotations

import json
import math
from typing import Any

import click

__all__ = ["command_name", "to_json"]


def command_name() -> str | None:
    """Return the name of the command that runs; None before one was found on the command line."""
    context = click.get_current_context(silent=True)
    return None if context is None or context.parent is None else context.info_name


def to_json(value: object) -> str:
    """Return one line of strict JSON: what is not a finite number (a broken source's NaN) becomes ``null``."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
