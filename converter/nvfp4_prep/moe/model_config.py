"""``config.json`` of a model: the language model's part may stand at the top or be nested in a multimodal one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nvfp4_prep.checkpoint.filenames import CONFIG, HF_QUANT_CONFIG

__all__ = ["NESTED_KEYS", "find_number", "positive", "quantization_configs", "text_configs"]

NESTED_KEYS = ("text_config", "llm_config", "language_config")
"""Where multimodal models keep their language model's config."""


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Return the parts that may speak of the language model: nested ones first, which win, then the whole."""
    for key in NESTED_KEYS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            yield nested
    yield config


def quantization_configs(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a checkpoint's quantization configs by place; the first one is the one that counts.

    Args:
        config: ``config.json``.
        hf_quant_config: ``hf_quant_config.json``, where there is one.
    """
    found: dict[str, Any] = {}
    for holder, part in (("", config), *((key, config.get(key)) for key in NESTED_KEYS)):
        if isinstance(part, Mapping) and isinstance(part.get("quantization_config"), Mapping):
            where = f"{holder}.quantization_config" if holder else "quantization_config"
            found[f"{CONFIG}:{where}"] = part["quantization_config"]
    if hf_quant_config is not None:
        found[HF_QUANT_CONFIG] = dict(hf_quant_config)
    return found


def positive(value: object) -> float | None:
    """Return a number of a config as a float; ``None`` for what is not a number, 0, negative, NaN or beyond float64."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value <= sys.float_info.max else None  # type: ignore[operator,arg-type]


def find_number(config: Mapping[str, Any], keys: Iterable[str]) -> float | None:
    """Return the first :func:`positive` value of these keys, in the order of :func:`text_configs`; ``None`` for none.

    So a 0 says nothing, as a missing key.
    """
    wanted = tuple(keys)
    values = (positive(part.get(key)) for part in text_configs(config) for key in wanted)
    return next((value for value in values if value is not None), None)
