"""Inspect: what is this checkpoint? Answers for sources and prepared ones, and never fails on what convert refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4_prep.activation import Activation, find_activation
from nvfp4_prep.config_fit import classify_layers
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.index import read_index
from nvfp4_prep.manifest import MANIFEST
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.planning import make_plan
from nvfp4_prep.prepared import PreparedCheckpoint
from nvfp4_prep.scalars import read_scalars
from nvfp4_prep.source import LocalSource, Source
from nvfp4_prep.stamp import quantization_configs

__all__ = ["InspectedLayer", "Inspection", "inspect"]


@dataclass(frozen=True)
class InspectedLayer:
    """One MoE layer.

    Attributes:
        experts_path: module path.
        status: ``can be prepared``, ``prepared``, ``passes through`` or ``refused``.
        reason: why not, where not.
        experts, intermediate, hidden: E, I and H, where known.
        gated: gate and up, or up alone.
        format: quantization format.
        activation: kind, and limit where it is clamped.
        differing: experts whose gate and up global scales differ.
        tp_sizes: tensor-parallel sizes that the prepared layer serves (or would, with the default options).
        gate_up_figures: of a prepared layer, what bringing differing scales together cost.
    """

    experts_path: str
    status: str
    reason: str = ""
    experts: int | None = None
    intermediate: int | None = None
    hidden: int | None = None
    gated: bool | None = None
    format: str = ""
    activation: str = ""
    differing: int | None = None
    tp_sizes: tuple[int, ...] = ()
    gate_up_figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        path: as given.
        prepared: whether it is a prepared checkpoint.
        model_type, architectures: from the config.
        quantization: the quantization config that counts, without long lists.
        layers: MoE layers.
        tensors, shards, nbytes: of the whole checkpoint.
        left_out: weight files that are no part of the checkpoint.
        refusal: what convert would say instead of converting; empty if it would convert.
        prepared_as: layout and provenance of a prepared checkpoint.
    """

    path: str
    prepared: bool
    model_type: str
    architectures: tuple[str, ...]
    quantization: dict[str, Any]
    layers: tuple[InspectedLayer, ...]
    tensors: int
    shards: int
    nbytes: int
    left_out: tuple[str, ...] = ()
    refusal: str = ""
    prepared_as: dict[str, Any] = field(default_factory=dict)


def inspect(checkpoint: str | Path | Source) -> Inspection:
    """Describes a checkpoint. Reads headers, configs and scalars only.

    Raises:
        SourceError: if it cannot be read.
        CheckpointError: if it is a prepared checkpoint with a broken manifest.
    """
    if isinstance(checkpoint, str | Path):
        if (Path(checkpoint) / MANIFEST).is_file():
            return _inspect_prepared(PreparedCheckpoint(checkpoint))
        source: Source = LocalSource(Path(checkpoint))
    else:
        source = checkpoint
        if any(file.name == MANIFEST for file in source.files()):
            return _inspect_prepared(PreparedCheckpoint(source.label, source))
    try:
        return _inspect_source(source, str(checkpoint) if isinstance(checkpoint, str | Path) else source.label)
    finally:
        source.close()


def _inspect_source(source: Source, path: str) -> Inspection:
    index = read_index(source)
    found = classify_layers(index)
    layers = [
        InspectedLayer(
            other.experts_path,
            "refused" if other.refused else "passes through",
            f"{other.reason}. {other.instead}" if other.refused else other.reason,
        )
        for other in found.others
    ]
    for layer in found.layers:
        layout = ConvertOptions().layout_for(gated=layer.gated)
        try:
            differing: int | None = len(read_scalars(source, [layer])[0].differing)
            status, reason = "can be prepared", ""
            layout.check(layer.dims)
        except (NvfpPrepError, ValueError) as error:
            status, reason, differing = "refused", str(error), None
        layers.append(
            InspectedLayer(
                layer.experts_path,
                status,
                reason,
                layer.dims.experts,
                layer.dims.intermediate,
                layer.dims.hidden,
                layer.gated,
                layer.format,
                _activation_text(find_activation(index.config, gated=layer.gated, layer=layer.index)),
                differing,
                layout.tp_sizes(layer.dims),
            )
        )
    refusal = ""
    try:
        make_plan(source)
    except NvfpPrepError as error:
        refusal = str(error)
    configs = quantization_configs(index.config, index.hf_quant_config)
    architectures = index.config.get("architectures")
    return Inspection(
        path=path,
        prepared=False,
        model_type=str(index.config.get("model_type", "")),
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        quantization=_short(next(iter(configs.values()), {})),
        layers=tuple(layers),
        tensors=len(index.tensors),
        shards=len(index.headers),
        nbytes=sum(header.file_nbytes for header in index.headers.values()),
        left_out=index.left_out,
        refusal=refusal,
    )


def _activation_text(activation: Activation) -> str:
    return activation.kind.value + (f" clamped at {activation.clamp:g}" if activation.clamp is not None else "")


def _short(config: dict[str, Any]) -> dict[str, Any]:
    """Without the lists of module names, which fill pages."""
    nested = config.get("quantization")
    flat = {**config, **nested} if isinstance(nested, dict) else dict(config)
    keys = ("quant_method", "quant_algo", "format", "group_size", "kv_cache_quant_algo", "producer")
    return {key: flat[key] for key in keys if key in flat}


def _inspect_prepared(checkpoint: PreparedCheckpoint) -> Inspection:
    with checkpoint as opened:
        manifest = opened.manifest
        layers = tuple(
            InspectedLayer(
                record.layer.experts_path,
                "prepared",
                "",
                record.layer.dims.experts,
                record.layer.dims.intermediate,
                record.layer.dims.hidden,
                record.layer.gated,
                record.layer.format,
                _activation_text(record.activation),
                record.gate_up.differing,
                record.tp_sizes,
                dict(record.gate_up.figures),
            )
            for record in manifest.layers
        )
        passed = tuple(InspectedLayer(where, "passes through", reason) for where, reason in manifest.passed.items())
        index = read_index(opened.files)
        architectures = index.config.get("architectures")
        return Inspection(
            path=str(opened.path),
            prepared=True,
            model_type=str(index.config.get("model_type", "")),
            architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
            quantization=_short(next(iter(manifest.quantization.values()), {})),
            layers=layers + passed,
            tensors=len(index.tensors),
            shards=len(index.headers),
            nbytes=sum(header.file_nbytes for header in index.headers.values()),
            prepared_as={
                "options": manifest.options.to_dict(),
                "tool_version": manifest.tool_version,
                "source": manifest.source,
                "revision": manifest.revision,
                "tp_sizes": list(manifest.tp_sizes),
            },
        )
