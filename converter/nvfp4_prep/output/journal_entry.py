"""One finished file in the journal, checked where it is parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from nvfp4_prep._util.digests import is_sha256
from nvfp4_prep.checkpoint.filenames import is_safe_name
from nvfp4_prep.output.experts_fact import ExpertsFact, is_count

__all__ = ["JournalEntry"]


@dataclass(frozen=True)
class JournalEntry:
    """A finished file.

    Attributes:
        file: its name in the target.
        nbytes: its size.
        sha256: of the file, in hex; ``None`` where the command does not need it.
        digests: sha256 by key, of the source's tensors that went into it.
        facts: of its units, in their order.
        mtime_ns: its modification time, in nanoseconds since 1970; ``None`` in the journals of earlier releases.
    """

    file: str
    nbytes: int
    sha256: str | None
    digests: dict[str, str] = field(default_factory=dict)
    facts: tuple[ExpertsFact, ...] = ()
    mtime_ns: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the journal's line."""
        return {**asdict(self), "facts": [fact.to_json() for fact in self.facts]}

    @classmethod
    def parse(cls, line: Mapping[str, Any]) -> Self | None:
        """Return the entry of a line, or ``None`` if it names no file or is not valid: such a file is made again."""
        name, nbytes, sha256 = line.get("file"), line.get("nbytes"), line.get("sha256")
        digests, values = line.get("digests", {}), line.get("facts", [])
        mtime_ns = line.get("mtime_ns")
        facts = [ExpertsFact.parse(value) for value in values] if isinstance(values, list) else [None]
        valid = (
            isinstance(name, str)
            and is_safe_name(name)
            and is_count(nbytes)
            and (sha256 is None or is_sha256(sha256))
            and isinstance(digests, dict)
            and all(is_sha256(value) for value in digests.values())
            and (mtime_ns is None or type(mtime_ns) is int)
        )
        known = tuple(fact for fact in facts if fact is not None)
        if not valid or len(known) != len(facts):
            return None
        return cls(str(name), int(str(nbytes)), sha256, digests, known, mtime_ns)
