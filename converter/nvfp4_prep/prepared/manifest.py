"""The manifest ``nvfp4_prep.json``: what was prepared, from what, how, and what was verified.

Read from untrusted directories too, so every value is checked; a manifest that does not parse is a
:class:`CheckpointError`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, parse_json
from nvfp4_prep.checkpoint.filenames import FORMAT_VERSION, MANIFEST
from nvfp4_prep.errors import CheckpointError, UsageError
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.prepared.config_edits import ConfigEdit, edits_from_json, edits_to_json
from nvfp4_prep.prepared.manifest_layers import GateUpRecord, LayerRecord, layer_from_dict, layer_to_dict
from nvfp4_prep.prepared.manifest_values import file_kind, file_name, items, mapping, sha256, text, text_name, whole
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep_kernels import LayoutError

__all__ = ["FileRecord", "GateUpRecord", "LayerRecord", "Manifest"]

_DAMAGED = renewal(MANIFEST)


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint.

    ``kind`` is a :class:`~nvfp4_prep.checkpoint.filenames.FileKind` value, ``side`` or ``made``.
    """

    nbytes: int
    sha256: str
    kind: str


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.

    Attributes:
        tool_version: of nvfp4-prep.
        options: the conversion's.
        source: Hub id or directory name.
        revision: resolved commit, where there is one.
        texts: the source's files that the prepared checkpoint replaces, verbatim, by name.
        quantization: the source's own quantization configs by file.
        layers: prepared layers.
        passed: MoE layers that passed through, path to reason.
        files: everything but the manifest itself.
        verified: which checks ran, on what, with their figures.
        config_edits: what ``config.json`` has been changed in since, on purpose (``nvfp4-prep restamp``).
    """

    tool_version: str
    options: ConvertOptions
    source: str
    revision: str | None
    texts: Mapping[str, bytes]
    quantization: Mapping[str, Any]
    layers: tuple[LayerRecord, ...]
    passed: Mapping[str, str]
    files: Mapping[str, FileRecord]
    verified: tuple[Mapping[str, Any], ...]
    config_edits: tuple[ConfigEdit, ...] = ()

    def __repr__(self) -> str:
        of = f"{self.source}@{self.revision}" if self.revision else self.source
        return (
            f"<Manifest of {of!r}: {len(self.layers)} layers, {len(self.files)} files, layout {self.options.layout},"
            f" nvfp4-prep {self.tool_version}>"
        )

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """Tensor-parallel sizes that all layers serve."""
        common = set.intersection(*(set(layer.tp_sizes) for layer in self.layers)) if self.layers else set()
        return tuple(sorted(common))

    def to_bytes(self) -> bytes:
        """Return the JSON; the same manifest gives the same bytes."""
        return (json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n").encode()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value."""
        return {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "nvfp4-prep", "version": self.tool_version},
            "options": self.options.to_dict(),
            "source": {
                "name": self.source,
                "revision": self.revision,
                "quantization": dict(self.quantization),
                "texts": {name: _encode_text(text) for name, text in self.texts.items()},
            },
            "tp_sizes": list(self.tp_sizes),
            "layers": [layer_to_dict(layer) for layer in self.layers],
            "passed_through_experts": dict(self.passed),
            "files": {
                name: {"nbytes": file.nbytes, "sha256": file.sha256, "kind": file.kind}
                for name, file in self.files.items()
            },
            "verified": [dict(check) for check in self.verified],
            **({"config_edits": edits_to_json(self.config_edits)} if self.config_edits else {}),
        }

    @classmethod
    def from_bytes(cls, raw: bytes, where: str = MANIFEST) -> Manifest:
        """Parse and check a manifest.

        Raises:
            CheckpointError: if it is not a manifest, of another format version, or inconsistent.
        """
        value = parse_json(raw, where, CheckpointError, max_depth=MAX_DEPTH, next_step=_DAMAGED)
        version = value.get("format_version") if isinstance(value, dict) else None
        if version is None:
            raise CheckpointError("is not a manifest (it has no format_version)", where=where, next_step=_DAMAGED)
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                "was written in another format",
                where=where,
                expected=f"format_version {FORMAT_VERSION}",
                actual=repr(version)[:60],
                next_step="Use the nvfp4-prep version that wrote it, or a newer one.",
            )
        try:
            return cls._from_dict(value)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, LayoutError, UsageError) as error:
            raise CheckpointError(f"is malformed ({_reason(error)})", where=where, next_step=_DAMAGED) from error

    @classmethod
    def _from_dict(cls, value: dict[str, Any]) -> Manifest:
        options = _options(value["options"])
        source = value["source"]
        revision = source["revision"]
        return cls(
            tool_version=text(value["tool"]["version"], "version of the tool"),
            options=options,
            source=text(source["name"], "name of the source"),
            revision=None if revision is None else text(revision, "revision of the source"),
            texts={text_name(name): _decode_text(kept) for name, kept in source["texts"].items()},
            quantization={
                place: dict(mapping(config, f"quantization of {place}"))
                for place, config in source["quantization"].items()
            },
            layers=tuple(layer_from_dict(layer, options) for layer in items(value["layers"], "layers")),
            passed={path: text(reason, "reason") for path, reason in value["passed_through_experts"].items()},
            files={file_name(name): _file_record(name, file) for name, file in value["files"].items()},
            verified=tuple(dict(mapping(check, "verified")) for check in items(value["verified"], "verified")),
            config_edits=edits_from_json(value.get("config_edits", [])),
        )


def _options(value: Mapping[str, Any]) -> ConvertOptions:
    for key in ("gate_up_block", "moe_tp"):
        whole(value[key], key, 1)
    return ConvertOptions.from_dict(dict(value))


def _file_record(name: str, value: Mapping[str, Any]) -> FileRecord:
    return FileRecord(
        whole(value["nbytes"], f"nbytes of {name}"),
        sha256(value["sha256"], f"sha256 of {name}"),
        file_kind(value["kind"], name),
    )


def _reason(error: Exception) -> str:
    """Return what was wrong; a missing key's name alone would say nothing."""
    return f"no key {error.args[0]!r}" if isinstance(error, KeyError) and error.args else str(error) or repr(error)


def _encode_text(raw: bytes) -> dict[str, str]:
    try:
        return {"text": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def _decode_text(value: Mapping[str, Any]) -> bytes:
    if "text" in value:
        return text(value["text"], "a source text").encode("utf-8")
    return base64.b64decode(text(value["base64"], "a source text"), validate=True)
