"""The stamp: what replaces ``quantization_config`` in a prepared checkpoint's ``config.json``, written and read.

Plain vLLM refuses it by its ``quant_method`` before anything is loaded; the plugin recognises it. It is flat and has
no ``producer`` key, because vLLM rewrites the method of configs whose producer is ModelOpt.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from nvfp4_prep.checkpoint.filenames import FORMAT_VERSION, HF_QUANT_CONFIG
from nvfp4_prep.errors import ServingError
from nvfp4_prep.layouts import LAYOUTS, LayoutName, layout_of_backend
from nvfp4_prep.moe.model_config import NESTED_KEYS, quantization_configs
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.prepared.config_edits import find_edits, same_value
from nvfp4_prep.prepared.manifest_values import sha256, text, whole
from nvfp4_prep_kernels import MoeLayout
from nvfp4_prep_kernels.fingerprint import fingerprint

__all__ = [
    "QUANT_METHOD",
    "STAMP_KEY",
    "Stamp",
    "changed_stamp",
    "config_bytes",
    "is_stamped",
    "make_stamp",
    "stamp_in",
    "stamp_places",
    "stamped",
]

STAMPED_KEY = "quantization_config"
QUANT_METHOD = "nvfp4_prep"
STAMP_KEY = "nvfp4_prep_stamp"
"""Key of the stamp once the source's own quantization_config has taken its place in a server's memory."""
_SWIZZLE = "128x4"
_FLAT_KEYS = ("quant_algo", "group_size", "kv_cache_quant_algo", "kv_cache_scheme", "ignore", "exclude_modules")


def _counting_config(configs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config that a server builds its methods from.

    It is the first, except for mixed precision without its list of layers, which vLLM then reads from
    ``hf_quant_config.json`` (a prepared checkpoint does not have that file).
    """
    first: Mapping[str, Any] = next(iter(configs.values()), {})
    legacy = configs.get(HF_QUANT_CONFIG)
    if str(first.get("quant_algo", "")).upper() != "MIXED_PRECISION" or "quantized_layers" in first:
        return first
    if not isinstance(legacy, Mapping):
        return first
    nested = legacy.get("quantization")
    return legacy if isinstance(nested, Mapping) and "quantized_layers" in nested else first


def make_stamp(source: Mapping[str, Any], options: ConvertOptions, *, gated: bool) -> dict[str, Any]:
    """Return the stamp for a checkpoint.

    Args:
        source: the source's quantization config that counts; empty if it has none.
        options: of the conversion.
        gated: whether the layers are gated; all layers of a model are alike.
    """
    layout = options.layout_for(gated=gated)
    nested = source.get("quantization")
    flat = nested if isinstance(nested, Mapping) else source
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "layout": _layout_dict(options, layout),
        "source": dict(source),
        **{key: flat[key] for key in _FLAT_KEYS if key in flat},
    }


def _layout_dict(options: ConvertOptions, layout: MoeLayout) -> dict[str, Any]:
    return {
        "name": LAYOUTS[options.layout].stamp_name,
        "gate_up_block": options.gate_up_block,
        "scale_swizzle": _SWIZZLE,
        "hidden_alignment": layout.hidden_alignment,
        "intermediate_alignment": layout.intermediate_alignment,
        "moe_tp": options.moe_tp,
        "fingerprint": fingerprint(layout),
    }


def stamped(
    source: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None, options: ConvertOptions, *, gated: bool
) -> dict[str, Any]:
    """Return the source's config with the stamp wherever a ``quantization_config`` stood (at the top if nowhere).

    Other keys keep their values and order.
    """
    configs = quantization_configs(source, hf_quant_config)
    stamp = make_stamp(_counting_config(configs), options, gated=gated)
    config = dict(source)
    for *above, key in stamp_places(source):
        if above:
            config[above[0]] = {**config[above[0]], key: stamp}
        else:
            config[key] = stamp
    return config


def stamp_places(source: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return where the stamp of a source's config stands: paths of keys from the top."""
    places: list[tuple[str, ...]] = []
    for key in NESTED_KEYS:
        nested = source.get(key)
        if isinstance(nested, Mapping) and STAMPED_KEY in nested:
            places.append((key, STAMPED_KEY))
    if STAMPED_KEY in source or not places:
        places.append((STAMPED_KEY,))
    return places


def changed_stamp(expected: Mapping[str, Any], actual: object) -> list[str]:
    """Return the keys of a stamp that differ, as dotted paths; keys of a later version are ignored.

    What is the source's own (``source`` and the keys beside it) must be equal whole.
    """
    if not isinstance(actual, Mapping):
        return [""]
    changed = [
        f"layout.{key}" if isinstance(actual.get("layout"), Mapping) else "layout"
        for key, value in expected["layout"].items()
        if not isinstance(actual.get("layout"), Mapping) or not same_value(actual["layout"].get(key), value)
    ]
    changed += [edit.name for edit in find_edits(_verbatim(expected), _verbatim(actual))]
    return sorted(set(changed))


def _verbatim(stamp: Mapping[str, Any]) -> dict[str, Any]:
    known = ("quant_method", "format_version", "source", "producer", "quantization", *_FLAT_KEYS)
    return {key: stamp[key] for key in known if key in stamp}


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return the text of a config as this package writes it."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    # half a surrogate pair has no UTF-8: it stays escaped, as it must have been in the source
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text).encode("utf-8")


@dataclass(frozen=True)
class Stamp:
    """A stamp that this version understands.

    Attributes:
        layout: name of the layout.
        gate_up_block, moe_tp: parameters of the layout.
        hidden_alignment: what the layout of this name pads H to; another one is refused.
        fingerprint: digest of a fixed small layer in this layout.
        source: the original quantization_config.
    """

    layout: LayoutName
    gate_up_block: int
    hidden_alignment: int
    moe_tp: int
    fingerprint: str
    source: Mapping[str, Any]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Stamp:
        """Read a stamp.

        Raises:
            ServingError: if it is incomplete or was written by a newer nvfp4-prep.
        """
        version = config.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ServingError(
                "prepared checkpoint in a format that this version of nvfp4-prep does not know",
                where="config.json, quantization_config.format_version",
                expected=FORMAT_VERSION,
                actual=version,
                next_step="Install the version of nvfp4-prep that wrote it (see nvfp4_prep.json), or convert again.",
            )
        try:
            layout, source = config["layout"], config["source"]
            name = layout_of_backend(text(layout["name"], "name"))
            stamp = cls(
                layout=name or LayoutName.CUTEDSL,
                gate_up_block=whole(layout["gate_up_block"], "gate_up_block", 1),
                hidden_alignment=whole(layout["hidden_alignment"], "hidden_alignment", 1),
                moe_tp=whole(layout["moe_tp"], "moe_tp", 1),
                fingerprint=sha256(layout["fingerprint"], "fingerprint"),
                source=copy.deepcopy(dict(source)),
            )
            if not isinstance(stamp.source.get("quant_method", ""), str):
                raise TypeError("the source's quant_method is not a string")
            moe_layout = stamp.moe_layout(gated=True)
            known = name is not None and layout["scale_swizzle"] == _SWIZZLE
            known = known and stamp.hidden_alignment == moe_layout.hidden_alignment
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ServingError(
                f"stamp is incomplete or damaged ({type(error).__name__}: {error})",
                where="config.json, quantization_config",
                next_step="Run `nvfp4-prep verify` on the directory.",
            ) from error
        if not known:
            raise ServingError(
                "unknown layout in the stamp",
                where="config.json, quantization_config.layout",
                expected=f"name {' or '.join(facts.stamp_name for facts in LAYOUTS.values())},"
                f" hidden_alignment {moe_layout.hidden_alignment}, scale_swizzle {_SWIZZLE}",
                actual=dict(layout),
                next_step="Install the version of nvfp4-prep that wrote the checkpoint.",
            )
        return stamp

    @property
    def layout_name(self) -> str:
        """The layout's name in the stamp."""
        return LAYOUTS[self.layout].stamp_name

    @property
    def batched(self) -> bool:
        """Whether the file is for the batched kernel."""
        return self.layout is LayoutName.CUTEDSL_BATCHED

    def moe_layout(self, *, gated: bool) -> MoeLayout:
        """Return the layout of a layer in this checkpoint.

        Raises:
            LayoutError: if the stamp's parameters make no layout.
        """
        return MoeLayout.named(self.layout, gated=gated, gate_up_block=self.gate_up_block, moe_tp=self.moe_tp)

    def check_fingerprint(self, *, gated: bool) -> None:
        """Raise :class:`ServingError` unless our layout of this name gives the bytes that the writer's gave."""
        own = fingerprint(self.moe_layout(gated=gated))
        if self.fingerprint == own:
            return
        raise ServingError(
            "layout fingerprint does not match: the checkpoint was written with another layout than its name says",
            where="config.json, quantization_config.layout.fingerprint",
            expected=own,
            actual=self.fingerprint,
            next_step="Install the version of nvfp4-prep that wrote it (see nvfp4_prep.json), or convert again.",
        )


def is_stamped(config: Any) -> TypeGuard[MutableMapping[str, Any]]:
    """Return whether this is a ``quantization_config`` with a stamp that was not yet replaced."""
    return isinstance(config, MutableMapping) and config.get("quant_method") == QUANT_METHOD


def stamp_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the stamp in a ``config.json`` as it is on disk: the model's, or its language model's."""
    for *above, key in reversed(stamp_places(config)):
        found = (config[above[0]] if above else config).get(key)
        if is_stamped(found):
            return found
    return None
