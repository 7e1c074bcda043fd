"""The ``config.json`` of a prepared checkpoint against its manifest: an intact stamp, and the edits beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.errors import CheckpointError
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint, source_configs
from nvfp4_prep.prepared.config_edits import ConfigEdit, apply_edits, find_edits
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep.prepared.stamp import changed_stamp, config_bytes, stamp_places, stamped

__all__ = [
    "FOREIGN_CODE",
    "RESTAMP",
    "STAMP",
    "ServedConfig",
    "converted_config",
    "expected_config",
    "read_served_config",
]

FOREIGN_CODE = (
    "It names code that the source does not: remove it, and do not serve with --trust-remote-code before that."
)
STAMP = f"Put these keys back as they were: they say what the weights are. Else: {renewal(CONFIG)}"
RESTAMP = "To keep the edits run nvfp4-prep restamp on the directory; else put the file back."


@dataclass(frozen=True)
class ServedConfig:
    """A served config against the manifest: its stamp and its edits.

    Attributes:
        config: what the file holds.
        stamp: changed keys of the stamp; empty if it is intact.
        edits: all edits beside the stamp, relative to what was converted.
        code: those of the edits that name code to be loaded: never kept, recorded or not.
        unrecorded: places where the config is not what the manifest's edits make of it.
        nbytes, sha256: of the file.
        canonical: whether the file's bytes are those that this package writes for the manifest.
    """

    config: Mapping[str, Any]
    stamp: tuple[str, ...]
    edits: tuple[ConfigEdit, ...]
    code: tuple[str, ...]
    unrecorded: tuple[str, ...]
    nbytes: int
    sha256: str
    canonical: bool


def converted_config(manifest: Manifest) -> dict[str, Any]:
    """Return the config as it was converted: the source's with the stamp, without later edits."""
    config, hf_quant_config = source_configs(manifest)
    gated = any(layer.gated for layer in manifest.layers)
    return stamped(config, hf_quant_config, manifest.options, gated=gated)


def expected_config(manifest: Manifest) -> bytes:
    """Return the ``config.json`` that belongs to a manifest, recorded edits included.

    Raises:
        CheckpointError: if the manifest does not hold the source's, or its edits touch the stamp.
    """
    return config_bytes(_edited(manifest, converted_config(manifest)))


def _edited(manifest: Manifest, converted: Mapping[str, Any]) -> dict[str, Any]:
    edited = apply_edits(converted, manifest.config_edits)
    for place in stamp_places(source_configs(manifest)[0]):
        if changed_stamp(_at(converted, place), _at(edited, place)):
            raise CheckpointError(f"config_edits remove the stamp at {'.'.join(place)}", where=MANIFEST)
    return edited


def read_served_config(checkpoint: PreparedCheckpoint) -> ServedConfig:
    """Return what the directory's ``config.json`` holds.

    Raises:
        CheckpointError: if it is missing or malformed, or the manifest does not hold the source's.
    """
    manifest, raw = checkpoint.manifest, checkpoint.read_file(CONFIG)
    actual = checkpoint.read_json(CONFIG)
    converted = converted_config(manifest)
    edited = _edited(manifest, converted)
    places = stamp_places(source_configs(manifest)[0])
    stamp = [
        ".".join((*place, key)).rstrip(".")
        for place in places
        for key in changed_stamp(_at(converted, place), _at(actual, place))
    ]
    found = find_edits(converted, actual)
    beside = tuple(edit for edit in found if not any(_overlap(edit.path, place) for place in places))
    stamp += [edit.name for edit in beside if edit.touches_stamp]
    unrecorded = [edit.name for edit in find_edits(edited, actual) if not any(_overlap(edit.path, p) for p in places)]
    edits = tuple(edit for edit in beside if not edit.touches_stamp)
    code = tuple(edit.name for edit in edits if edit.loads_code)
    return ServedConfig(
        config=actual,
        stamp=tuple(stamp),
        edits=edits,
        code=code,
        unrecorded=tuple(name for name in unrecorded if name not in stamp and name not in code),
        nbytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        canonical=raw == config_bytes(edited),
    )


def _at(config: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    part: Any = config
    for key in place:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _overlap(path: tuple[str, ...], place: tuple[str, ...]) -> bool:
    shared = min(len(path), len(place))
    return path[:shared] == place[:shared]
