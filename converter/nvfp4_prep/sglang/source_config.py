"""The stamp and the source's quantization config, which takes its place in memory before SGLang reads it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.sglang_rules import COMPRESSED
from nvfp4_prep.prepared.stamp import STAMP_KEY, Stamp, is_stamped

__all__ = ["SOURCE_METHODS", "adopt_source", "adopted_stamp", "stamped_configs"]

SOURCE_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed", COMPRESSED)
"""Values of ``quant_method`` of sources that can hold NVFP4 experts."""


def stamped_configs(hf_config: Any) -> list[MutableMapping[str, Any]]:
    """Return the stamps of a model's config: its own, and that of its language model."""
    holders = (hf_config, getattr(hf_config, "text_config", None))
    return [
        found for found in (getattr(holder, "quantization_config", None) for holder in holders) if is_stamped(found)
    ]


def adopted_stamp(hf_config: Any) -> Mapping[str, Any] | None:
    """Return the stamp that :func:`adopt_source` kept in a model's config, or ``None`` for a stock checkpoint."""
    for holder in (hf_config, getattr(hf_config, "text_config", None)):
        config = getattr(holder, "quantization_config", None)
        if isinstance(config, Mapping) and STAMP_KEY in config:
            stamp: Mapping[str, Any] = config[STAMP_KEY]
            return stamp
    return None


def adopt_source(config: MutableMapping[str, Any]) -> None:
    """Replace a stamp by the source's quantization_config, in place, and keep the stamp under :data:`STAMP_KEY`.

    Raises:
        ServingError: if the stamp cannot be read or its source is of no format with NVFP4 experts.
    """
    stamp = Stamp.parse(config)
    original = dict(config)
    source = _flat(copy.deepcopy(dict(stamp.source)))
    method = source.setdefault("quant_method", "modelopt")
    if method not in SOURCE_METHODS:
        raise ServingError(
            "the source's quantization method cannot hold prepared experts",
            where="config.json, quantization_config.source",
            expected=", ".join(SOURCE_METHODS),
            actual=method,
            next_step="Run `nvfp4-prep verify` on the directory.",
        )
    if str(source.get("quant_algo", "")).upper() == "MIXED_PRECISION":
        # Else SGLang would look for hf_quant_config.json, which a prepared checkpoint does not have.
        source.setdefault("quantized_layers", {})
        if "kv_cache_scheme" not in source:
            source.setdefault("kv_cache_quant_algo", None)
    config.clear()
    config.update(source)
    config[STAMP_KEY] = original


def _flat(source: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of hf_quant_config.json in the flat form of config.json, with the keys that SGLang reads."""
    nested = source.get("quantization")
    if not isinstance(nested, dict):
        return source
    return {**{key: value for key, value in source.items() if key != "quantization"}, **nested}
