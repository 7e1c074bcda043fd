"""Edits of a prepared checkpoint's ``config.json`` that are kept on purpose: rope scaling, EOS, whatever a fleet needs.

An edit is a place and what stands there now. JSON merge patches will not do: they cannot set a value to null.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvfp4_prep.checkpoint.bounded_json import SOURCE_MAX_DEPTH

__all__ = ["ConfigEdit", "apply_edits", "edits_from_json", "edits_to_json", "find_edits", "same_value"]

_STAMPS = frozenset(("quantization_config", "compression_config"))
"""Keys that servers read the quantization from: the stamp's, wherever they stand."""
_CODE = frozenset(("auto_map", "custom_pipelines"))
"""Keys that name code to be loaded, from this repository or from any other, wherever they stand."""
_MAX_EDITS = 10_000


@dataclass(frozen=True)
class ConfigEdit:
    """One edit.

    Attributes:
        path: keys from the top of the config to the place; lists are replaced as a whole.
        value: what stands there now; ``None`` also for JSON's null.
        removed: whether nothing stands there any more.
    """

    path: tuple[str, ...]
    value: Any = None
    removed: bool = False

    @property
    def name(self) -> str:
        """The place as people write it."""
        return ".".join(self.path)

    @property
    def touches_stamp(self) -> bool:
        """Whether it changes, adds or removes a quantization config."""
        return bool(_STAMPS.intersection(self.path)) or _holds(_STAMPS, self.value)

    @property
    def loads_code(self) -> bool:
        """Whether it adds or changes a key that names code; to remove one is harmless."""
        return not self.removed and (bool(_CODE.intersection(self.path)) or _holds(_CODE, self.value))


def _holds(keys: frozenset[str], value: object) -> bool:
    """Return whether a JSON value holds one of these keys, at any depth."""
    if isinstance(value, list):
        return any(_holds(keys, inner) for inner in value)
    return isinstance(value, Mapping) and any(key in keys or _holds(keys, inner) for key, inner in value.items())


def same_value(one: object, other: object) -> bool:
    """Return whether two JSON values are alike: NaN equals itself, and 1, 1.0 and true are three values."""
    pending = [(one, other)]
    while pending:
        a, b = pending.pop()
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if a.keys() != b.keys():
                return False
            pending += [(a[key], b[key]) for key in a]
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
            if len(a) != len(b):
                return False
            pending += zip(a, b, strict=True)
        elif type(a) is not type(b) or not (a == b or (a != a and b != b)):
            return False
    return True


def find_edits(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[ConfigEdit, ...]:
    """Return what turns ``before`` into ``after``, by place."""
    return tuple(sorted(_edits(before, after), key=lambda edit: edit.path))


def _edits(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[ConfigEdit]:
    pending: list[tuple[tuple[str, ...], Mapping[str, Any], Mapping[str, Any]]] = [((), before, after)]
    while pending:
        path, old, new = pending.pop()
        for key in old.keys() | new.keys():
            here = (*path, key)
            if key not in new:
                yield ConfigEdit(here, removed=True)
            elif key not in old:
                yield ConfigEdit(here, new[key])
            elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
                pending.append((here, old[key], new[key]))
            elif not same_value(old[key], new[key]):
                yield ConfigEdit(here, new[key])


def apply_edits(config: Mapping[str, Any], edits: Sequence[ConfigEdit]) -> dict[str, Any]:
    """Return the config after some edits; the one given stays as it is."""
    edited = copy.deepcopy(dict(config))
    for edit in edits:
        *above, last = edit.path
        part = edited
        for key in above:
            if not isinstance(part.get(key), dict):
                part[key] = {}
            part = part[key]
        if edit.removed:
            part.pop(last, None)
        else:
            part[last] = edit.value
    return edited


def edits_to_json(edits: Sequence[ConfigEdit]) -> list[dict[str, Any]]:
    """Return the manifest's form."""
    return [
        {"path": list(edit.path), **({"removed": True} if edit.removed else {"value": edit.value})} for edit in edits
    ]


def edits_from_json(value: object) -> tuple[ConfigEdit, ...]:
    """Return the edits of a manifest; raise ``ValueError`` for anything else, or for one that touches the stamp."""
    if not isinstance(value, list) or len(value) > _MAX_EDITS:
        raise ValueError(f"config_edits must be a list of at most {_MAX_EDITS}")
    edits = tuple(_edit_from_json(item) for item in value)
    if any(edit.touches_stamp for edit in edits):
        raise ValueError("config_edits must not touch a quantization config")
    return edits


def _edit_from_json(item: object) -> ConfigEdit:
    path = item.get("path") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(path, list) or not path:
        raise ValueError("config_edits must have a path each")
    if len(path) > SOURCE_MAX_DEPTH:
        raise ValueError(f"config_edits must name places at most {SOURCE_MAX_DEPTH} levels deep")
    if not all(isinstance(key, str) for key in path) or item.get("removed", False) not in (True, False):
        raise ValueError("config_edits must name places by keys")
    removed = item.get("removed", False) is True
    if removed == ("value" in item):
        raise ValueError("config_edits must have a value, or removed, each")
    return ConfigEdit(tuple(path), item.get("value"), removed)
