"""The front matter of a source's model card: YAML of a stranger, bounded before and while it is read."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml  # a dependency of huggingface-hub, which reads the front matter with it too

__all__ = ["MAX_DEPTH", "MAX_ITEMS", "MAX_NBYTES", "FrontMatter", "read_front_matter"]

MAX_NBYTES = 128 << 10
"""Largest front matter that is read. Cards of models have 1 to 3 kB; PyYAML takes 7 µs and 130 bytes for a byte."""
MAX_DEPTH = 10
"""Deepest nesting of lists and mappings."""
MAX_ITEMS = 1000
"""Most items of one list or mapping."""

_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_BAD_VALUES = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions of PyYAML for a text: its own, those of int and date for a value, and the end of the stack."""
_OPENING = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n")


@dataclass(frozen=True)
class FrontMatter:
    """Model facts of a card's front matter.

    Attributes:
        values: key to value; empty where there is nothing that can be read.
        note: why a front matter that may be fine was not read; None if that is not so.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None


class _Exceeded(Exception):
    """A bound that the YAML exceeds."""


class _BoundedLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader whose result cannot be larger than its text: no aliases, bounded depth and number of items."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Exceeded("it has anchors or aliases")
        nests = isinstance(event, yaml.CollectionStartEvent)
        self._depth += nests
        if self._depth > MAX_DEPTH:
            raise _Exceeded(f"it is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= nests
        if nests and len(node.value) > MAX_ITEMS:
            raise _Exceeded(f"it has a list or mapping of more than {MAX_ITEMS} items")
        return node


def read_front_matter(card: bytes) -> FrontMatter:
    """Return the front matter of a card; an empty one where there is none or the Hub could not read it either."""
    head = card[: MAX_NBYTES + 1024].decode("utf-8", "replace")
    match = _FRONT_MATTER.match(head)
    if match is None and (len(card) <= MAX_NBYTES or _OPENING.match(head) is None):
        return FrontMatter()
    if match is None or len(match[1].encode()) > MAX_NBYTES:
        return FrontMatter(note=f"it is larger than {MAX_NBYTES} bytes")
    try:
        loader = _BoundedLoader(match[1])
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
        yaml.safe_dump(value)
    except _Exceeded as problem:
        return FrontMatter(note=str(problem))
    except _BAD_VALUES:
        return FrontMatter()
    if not isinstance(value, dict):
        return FrontMatter()
    return FrontMatter({str(key): item for key, item in value.items() if _is_plain(key) and _is_carried(item)})


def _is_carried(value: object) -> bool:
    """Return whether a value is made of what metadata is made of, which sets, binary data and the like are not."""
    if isinstance(value, list):
        return all(map(_is_carried, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_carried(item) for key, item in value.items())
    return _is_plain(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int | datetime.date)
