"""The form of a digest that comes from outside."""

from __future__ import annotations

import re
from typing import TypeGuard

__all__ = ["is_sha256"]

_SHA256 = re.compile("[0-9a-f]{64}")


def is_sha256(value: object) -> TypeGuard[str]:
    """Return whether a value has the form of a sha256: 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
