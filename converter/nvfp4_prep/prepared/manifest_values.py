"""Checked values of a manifest: each is looked at once, where it is parsed.

A manifest may be a stranger's. JSON's types are taken as they are (``"5"`` and ``true`` are not numbers), and every
function raises ``ValueError`` with the name of the value, which :meth:`Manifest.from_bytes` turns into its own error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from nvfp4_prep._util.digests import is_sha256
from nvfp4_prep.checkpoint.filenames import (
    CONFIG,
    HF_QUANT_CONFIG,
    INDEX,
    MANIFEST,
    README,
    SAFETENSORS,
    FileKind,
    is_safe_name,
)

__all__ = [
    "MADE",
    "SIDE",
    "file_kind",
    "file_name",
    "flag",
    "items",
    "mapping",
    "number",
    "sha256",
    "text",
    "text_name",
    "whole",
]

SIDE, MADE = "side", "made"
"""Kinds of files beside :class:`~nvfp4_prep.checkpoint.filenames.FileKind`'s: copied unchanged, and written anew."""
_MAX_WHOLE = 2**63 - 1
_TENSOR_KINDS = frozenset(kind.value for kind in FileKind)
_MADE_NAMES = frozenset((CONFIG, INDEX, README))
_TEXT_NAMES = frozenset((CONFIG, HF_QUANT_CONFIG, INDEX, README))
"""The source files that a prepared checkpoint replaces; restore writes them back, so no other name is accepted."""
_MAX_NAME_NBYTES, _MAX_PATH_NBYTES = 255, 4000
"""Of one part of a path, and of the whole, as Linux file systems have them."""


def text(value: object, what: str) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a text, not {_short(value)}")
    return value


def whole(value: object, what: str, low: int = 0, high: int = _MAX_WHOLE) -> int:
    """Return a whole number of a range."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be a whole number from {low} to {high}, not {_short(value)}")
    return value


def number(value: object, what: str) -> float:
    """Return a finite number, as it was written."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {_short(value)}")
    return value


def flag(value: object, what: str) -> bool:
    """Return a truth value."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, not {_short(value)}")
    return value


def items(value: object, what: str) -> list[Any]:
    """Return a list."""
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, not {_short(value)}")
    return value


def mapping(value: object, what: str) -> Mapping[str, Any]:
    """Return an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, not {_short(value)}")
    return value


def sha256(value: object, what: str) -> str:
    """Return a digest: 64 lower-case hexadecimal digits."""
    if not is_sha256(value):
        raise ValueError(f"{what} must be a sha256 of 64 hexadecimal digits, not {_short(value)}")
    return value


def file_name(value: object) -> str:
    """Return the name of a file inside the checkpoint, with forward slashes."""
    name = text(value, "a file name")
    raw = os.fsencode(name) if is_safe_name(name) else b""  # a surrogate that no file system has raises ValueError
    longest = max(map(len, raw.split(b"/")))
    if not raw or name == MANIFEST or len(raw) > _MAX_PATH_NBYTES or longest > _MAX_NAME_NBYTES:
        raise ValueError(f"unsafe file name {_short(name)}")
    return name


def text_name(value: object) -> str:
    """Return the name of a source file that the manifest keeps verbatim."""
    if value not in _TEXT_NAMES:
        raise ValueError(f"unexpected source text {_short(value)}, allowed are {', '.join(sorted(_TEXT_NAMES))}")
    return text(value, "a text's name")


def file_kind(value: object, name: str) -> str:
    """Return the kind of a file, which its name must allow."""
    kind = text(value, f"kind of {name}")
    if kind in _TENSOR_KINDS:
        if not name.endswith(SAFETENSORS):
            raise ValueError(f"{name} of kind {kind} must be a .safetensors file")
    elif kind not in (SIDE, MADE):
        raise ValueError(f"kind of {name} must be one of {', '.join(sorted({*_TENSOR_KINDS, SIDE, MADE}))}")
    elif (name in _MADE_NAMES) != (kind == MADE):
        raise ValueError(f"{name} cannot be of kind {kind}: {', '.join(sorted(_MADE_NAMES))} are made, nothing else is")
    return kind


def _short(value: object) -> str:
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:60]}…"
