"""``config.json`` of a model: the language model's part may stand at the top or be nested in a multimodal one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["NESTED_KEYS", "find_number", "text_configs"]

NESTED_KEYS = ("text_config", "llm_config", "language_config")
"""Where multimodal models keep their language model's config."""


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts that may speak of the language model: nested ones first, which win, then the whole."""
    for key in NESTED_KEYS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            yield nested
    yield config


def find_number(config: Mapping[str, Any], keys: Iterable[str]) -> int | float | None:
    """The first of these keys that has a number, in the order of :func:`text_configs`; ``None`` if none has."""
    wanted = tuple(keys)
    for part in text_configs(config):
        for key in wanted:
            value = part.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return value
    return None
