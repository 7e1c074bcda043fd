"""One finished file in the journal, checked where it is parsed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from nvfp4_prep.checkpoint.filenames import is_safe_name
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["JournalEntry"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TENSORS = tuple(tensor.value for tensor in PreparedTensor)
_COUNTS = ("expert", "rounded", "underflowed")


@dataclass(frozen=True)
class JournalEntry:
    """A finished file.

    Attributes:
        file: its name in the target.
        nbytes: its size.
        sha256: of the file, in hex; ``None`` where the command does not need it.
        digests: sha256 by key, of the source's tensors that went into it.
        facts: JSON values of its units, in their order.
    """

    file: str
    nbytes: int
    sha256: str | None
    digests: dict[str, str] = field(default_factory=dict)
    facts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def parse(cls, line: Mapping[str, Any]) -> Self | None:
        """Return the entry of a line, or ``None`` if it names no file or is not valid: such a file is made again."""
        name, nbytes, sha256 = line.get("file"), line.get("nbytes"), line.get("sha256")
        digests, facts = line.get("digests", {}), line.get("facts", [])
        valid = (
            isinstance(name, str)
            and is_safe_name(name)
            and _is_count(nbytes)
            and (sha256 is None or _is_sha256(sha256))
            and isinstance(digests, dict)
            and all(_is_sha256(value) for value in digests.values())
            and isinstance(facts, list)
            and all(_is_fact(fact) for fact in facts)
        )
        return cls(str(name), int(str(nbytes)), sha256, digests, facts) if valid else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_fact(fact: object) -> bool:
    """Whether a value is what a unit of a layer's file says: the tensor, its experts' checksums, their rounding."""
    if not isinstance(fact, dict):
        return False
    crc32, reconciled, errors = fact.get("crc32"), fact.get("reconciled", []), fact.get("errors", [])
    return (
        fact.get("tensor") in _TENSORS
        and isinstance(crc32, list)
        and all(_is_count(value) and value < 2**32 for value in crc32)
        and isinstance(reconciled, list)
        and all(_is_outcome(item) for item in reconciled)
        and isinstance(errors, list)
        and all(isinstance(item, list) and len(item) == 3 and all(map(_is_number, item)) for item in errors)
    )


def _is_outcome(item: object) -> bool:
    return (
        isinstance(item, dict)
        and all(_is_count(item.get(key)) for key in _COUNTS)
        and _is_number(item.get("worst_relative"))
        and item.get("side") in ("gate", "up")
    )
