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

from nvfp4_prep.activation import Activation, ActivationKind
from nvfp4_prep.errors import CheckpointError, UsageError
from nvfp4_prep.formats import Leaf
from nvfp4_prep.layer_record_checks import check_expert_crc32, check_gate_up, check_groups
from nvfp4_prep.moe_layers import MoeLayer, TensorGroup
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.paths import CONFIG, HF_QUANT_CONFIG, INDEX, MANIFEST, README, is_safe_name
from nvfp4_prep_kernels import LayoutError, MoeDims, MoeLayout, Projection

__all__ = ["FORMAT_VERSION", "MANIFEST", "FileRecord", "GateUpRecord", "LayerRecord", "Manifest"]

FORMAT_VERSION = 1
_TEXT_NAMES = frozenset((CONFIG, HF_QUANT_CONFIG, INDEX, README))
"""The source files that a prepared checkpoint replaces; restore writes them back, so no other name is accepted."""


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint. ``kind`` is a :class:`~nvfp4_prep.plan_data.FileKind` value, or ``side`` or
    ``made``."""

    nbytes: int
    sha256: str
    kind: str


@dataclass(frozen=True)
class GateUpRecord:
    """Gate and up global scales of one layer.

    Attributes:
        differing: experts whose two scales differ.
        worst_ratio: largest ratio of the larger to the smaller.
        reconciled: experts whose block scales were rescaled, with the side (``gate`` or ``up``), in the experts' order.
        figures: what that cost: see :class:`~nvfp4_prep.gate_up_scales.Reconciled`, and ``relative_error`` of the
            differing experts' dequantized gate and up weights under each policy.
    """

    differing: int
    worst_ratio: float
    reconciled: tuple[tuple[int, str], ...]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class LayerRecord:
    """One prepared layer.

    Attributes:
        layer: the source's side; its groups have no records.
        layout: the prepared side.
        activation: of the experts.
        files: the files that hold the four big tensors.
        gate_up: see :class:`GateUpRecord`.
        source_sha256: by group key, the digest of the source tensors' bytes in the order of the experts.
        expert_crc32: for each of the four tensors, one CRC-32 for each expert's stored bytes.
    """

    layer: MoeLayer
    layout: MoeLayout
    activation: Activation
    files: tuple[str, ...]
    gate_up: GateUpRecord
    source_sha256: Mapping[str, str]
    expert_crc32: Mapping[str, tuple[int, ...]]

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """Tensor-parallel sizes that this layer serves bit-exactly."""
        return self.layout.tp_sizes(self.layer.dims)


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

    def __repr__(self) -> str:
        return (
            f"Manifest({self.source!r:.80}, layers={len(self.layers)}, files={len(self.files)},"
            f" tool_version={self.tool_version!r:.20})"
        )

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """Tensor-parallel sizes that all layers serve."""
        common = set.intersection(*(set(layer.tp_sizes) for layer in self.layers)) if self.layers else set()
        return tuple(sorted(common))

    def to_bytes(self) -> bytes:
        """JSON; the same manifest gives the same bytes."""
        return (json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n").encode()

    def to_dict(self) -> dict[str, Any]:
        """JSON value."""
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
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "passed_through_experts": dict(self.passed),
            "files": {
                name: {"nbytes": file.nbytes, "sha256": file.sha256, "kind": file.kind}
                for name, file in self.files.items()
            },
            "verified": [dict(check) for check in self.verified],
        }

    @classmethod
    def from_bytes(cls, raw: bytes, where: str = MANIFEST) -> Manifest:
        """Parses and checks.

        Raises:
            CheckpointError: if it is no manifest, of another format version, or inconsistent.
        """
        try:
            value = json.loads(raw)
            version = value["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"is no manifest ({error!r})",
                where=where,
                next_step="The file is damaged: download it again, or convert again.",
            ) from error
        if version != FORMAT_VERSION:
            raise CheckpointError(
                "was written in another format",
                where=where,
                expected=f"format_version {FORMAT_VERSION}",
                actual=version,
                next_step="Use the nvfp4-prep version that wrote it, or a newer one.",
            )
        try:
            return cls._from_dict(value)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, LayoutError, UsageError) as error:
            raise CheckpointError(
                f"is malformed ({error!r})",
                where=where,
                next_step="The file is damaged: download it again, or convert again.",
            ) from error

    @classmethod
    def _from_dict(cls, value: dict[str, Any]) -> Manifest:
        options = ConvertOptions.from_dict(value["options"])
        source = value["source"]
        return cls(
            tool_version=str(value["tool"]["version"]),
            options=options,
            source=str(source["name"]),
            revision=None if source["revision"] is None else str(source["revision"]),
            texts={_text_name(name): _decode_text(text) for name, text in source["texts"].items()},
            quantization={str(place): dict(config) for place, config in source["quantization"].items()},
            layers=tuple(_layer_from_dict(layer, options) for layer in value["layers"]),
            passed={str(path): str(reason) for path, reason in value["passed_through_experts"].items()},
            files={
                _file_name(name): FileRecord(int(file["nbytes"]), str(file["sha256"]), str(file["kind"]))
                for name, file in value["files"].items()
            },
            verified=tuple(dict(check) for check in value["verified"]),
        )


def _file_name(name: str) -> str:
    if not is_safe_name(name):
        raise ValueError(f"unsafe file name {name!r}")
    return name


def _text_name(name: str) -> str:
    if name not in _TEXT_NAMES:
        raise ValueError(f"unexpected source text {name!r}, allowed are {', '.join(sorted(_TEXT_NAMES))}")
    return name


def _encode_text(raw: bytes) -> dict[str, str]:
    try:
        return {"text": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def _decode_text(value: Mapping[str, str]) -> bytes:
    return value["text"].encode("utf-8") if "text" in value else base64.b64decode(value["base64"], validate=True)


def _layer_to_dict(record: LayerRecord) -> dict[str, Any]:
    layer, layout = record.layer, record.layout
    return {
        "layer": layer.index,
        "experts_path": layer.experts_path,
        "files": list(record.files),
        "experts": layer.dims.experts,
        "intermediate": layer.dims.intermediate,
        "hidden": layer.dims.hidden,
        "padded_intermediate": layout.padded_intermediate(layer.dims.intermediate),
        "padded_hidden": layout.padded_hidden(layer.dims.hidden),
        "gated": layer.gated,
        "activation": {
            "kind": record.activation.kind.value,
            "spelled": record.activation.spelled,
            "clamp": record.activation.clamp,
        },
        "tp_sizes": list(record.tp_sizes),
        "format": layer.format,
        "naming": layer.naming,
        "source_tensors": [_group_to_dict(group, record.source_sha256[group.key]) for group in layer.groups],
        "gate_up_scales": {
            "differing": record.gate_up.differing,
            "worst_ratio": record.gate_up.worst_ratio,
            "reconciled": [list(pair) for pair in record.gate_up.reconciled],
            "figures": dict(record.gate_up.figures),
        },
        "expert_crc32": {name: list(values) for name, values in record.expert_crc32.items()},
    }


def _group_to_dict(group: TensorGroup, sha256: str) -> dict[str, Any]:
    return {
        "head": group.head,
        "tail": group.tail,
        "leaf": group.leaf.value,
        "projections": [projection.value for projection in group.projections],
        "dtype": group.dtype,
        "shape": list(group.shape),
        "stacked": group.stacked,
        "transposed": group.transposed,
        "alternating": group.alternating,
        "sha256": sha256,
    }


def _group_from_dict(value: Mapping[str, Any]) -> TensorGroup:
    return TensorGroup(
        head=str(value["head"]),
        tail=str(value["tail"]),
        leaf=Leaf(value["leaf"]),
        projections=tuple(Projection(projection) for projection in value["projections"]),
        dtype=str(value["dtype"]),
        shape=tuple(int(size) for size in value["shape"]),
        stacked=bool(value["stacked"]),
        transposed=bool(value["transposed"]),
        alternating=bool(value["alternating"]),
    )


def _layer_from_dict(value: Mapping[str, Any], options: ConvertOptions) -> LayerRecord:
    dims = MoeDims(int(value["experts"]), int(value["intermediate"]), int(value["hidden"]))
    groups = tuple(_group_from_dict(group) for group in value["source_tensors"])
    gated = bool(value["gated"])
    layout = options.layout_for(gated=gated)
    layout.check(dims)
    crc32 = {str(name): tuple(int(number) for number in numbers) for name, numbers in value["expert_crc32"].items()}
    check_expert_crc32(crc32, dims.experts)
    layer = MoeLayer(
        experts_path=str(value["experts_path"]),
        index=int(value["layer"]),
        dims=dims,
        gated=gated,
        format=str(value["format"]),
        naming=str(value["naming"]),
        groups=groups,
    )
    check_groups(layer)
    gate_up = _gate_up_from_dict(value["gate_up_scales"])
    check_gate_up(gate_up, layer)
    return LayerRecord(
        layer=layer,
        layout=layout,
        activation=_activation_from_dict(value["activation"]),
        files=tuple(_file_name(name) for name in value["files"]),
        gate_up=gate_up,
        source_sha256={
            group.key: str(item["sha256"]) for group, item in zip(groups, value["source_tensors"], strict=True)
        },
        expert_crc32=crc32,
    )


def _activation_from_dict(value: Mapping[str, Any]) -> Activation:
    clamp = value["clamp"]
    return Activation(ActivationKind(value["kind"]), str(value["spelled"]), None if clamp is None else float(clamp))


def _gate_up_from_dict(value: Mapping[str, Any]) -> GateUpRecord:
    return GateUpRecord(
        differing=int(value["differing"]),
        worst_ratio=float(value["worst_ratio"]),
        reconciled=tuple((int(expert), str(Projection(side))) for expert, side in value["reconciled"]),
        figures=dict(value["figures"]),
    )
