"""Inspect: what is this checkpoint? Answers for sources and prepared ones, and never fails on what convert refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4_prep._util.arguments import SOURCE, checked
from nvfp4_prep._util.layer_strip import LayerCell
from nvfp4_prep._util.notebook import notebook_html
from nvfp4_prep._util.text import count, format_nbytes
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST, WORK_FOLDER
from nvfp4_prep.checkpoint.index import CheckpointIndex, read_index
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.errors import NvfpPrepError, OpenFilesError, SourceError
from nvfp4_prep.hub import opened_source, parse_address
from nvfp4_prep.moe.activation import Activation
from nvfp4_prep.moe.discovery import LayerFinding
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.moe.model_config import quantization_configs
from nvfp4_prep.moe.scalar_reader import read_scalars
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.output.target_checks import has_journal
from nvfp4_prep.planning.builder import make_plan
from nvfp4_prep.planning.plan import LayerPlan
from nvfp4_prep.planning.survey import survey
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.directory import odd_manifest
from nvfp4_prep.prepared.problems import Problems
from nvfp4_prep.prepared.structure import check_structure, raise_damaged

__all__ = ["InspectedLayer", "Inspection", "inspect"]


@dataclass(frozen=True)
class InspectedLayer:
    """One MoE layer.

    Attributes:
        experts_path: module path.
        status: ``can be prepared``; ``prepared``; ``passes through``: convert leaves it as it is (or has left it) while
            it prepares others; ``refused``: the reason for which convert would refuse the checkpoint; ``cannot be
            prepared``: it would pass through, but there is nothing to prepare or something is refused.
        reason: why not, where not.
        experts, intermediate, hidden: E, I and H, where known.
        gated: gate and up, or up alone.
        format: quantization format.
        activation: kind, and limit where it is clamped.
        differing: experts whose gate and up global scales differ; ``None`` where there is no gate.
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
    """Description of a checkpoint.

    Attributes:
        path: as given.
        prepared: whether it is a prepared checkpoint.
        model_type, architectures: from the config.
        quantization: the quantization config that counts, without long lists.
        layers: MoE layers.
        tensors, shards, nbytes: of the whole checkpoint.
        left_out: files that are not part of the model.
        left_out_reasons: why each of them is not, by name.
        warnings: what is wrong with the checkpoint and does not keep it from being converted.
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
    warnings: tuple[str, ...] = ()
    refusal: str = ""
    prepared_as: dict[str, Any] = field(default_factory=dict)
    left_out_reasons: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Inspection({self.path!r:.80}, prepared={self.prepared}, model_type={self.model_type!r:.40},"
            f" layers={len(self.layers)}, tensors={self.tensors}, nbytes={self.nbytes}, refusal={self.refusal!r:.60})"
        )

    def _repr_html_(self) -> str:
        """Return the inspection as a notebook shows it."""
        return notebook_html(
            f"{self.path}: {'prepared' if self.prepared else 'source'} checkpoint",
            {
                "model": ", ".join(self.architectures) or self.model_type,
                "contents": f"{count(self.tensors, 'tensor')}, {format_nbytes(self.nbytes)}",
                "layers": count(len(self.layers), "MoE layer"),
                "convert would refuse": self.refusal,
                "warnings": "; ".join(self.warnings),
            },
            [_cell(layer) for layer in self.layers],
        )


_CELL_KINDS = {"prepared": "good", "can be prepared": "plain", "refused": "bad"}


def _cell(layer: InspectedLayer) -> LayerCell:
    number = re.search(r"\d+", layer.experts_path)
    words = f"{layer.experts_path}: {layer.status}" + (f" ({layer.reason})" if layer.reason else "")
    return LayerCell(number[0] if number else "-", _CELL_KINDS.get(layer.status, "other"), words)


@checked(checkpoint=SOURCE)
def inspect(checkpoint: str | Path | Source) -> Inspection:
    """Describe a checkpoint. Reads headers, configs and scalars only.

    Raises:
        SourceError: if it cannot be read.
        CheckpointError: if it is a prepared checkpoint with a broken manifest, or an unfinished one.
    """
    on_disk = isinstance(checkpoint, Path) or (isinstance(checkpoint, str) and parse_address(checkpoint) is None)
    if on_disk:
        root = Path(str(checkpoint))
        unfinished = has_journal(root) or ((root / WORK_FOLDER).is_dir() and not (root / CONFIG).is_file())
        if unfinished or (root / MANIFEST).is_file() or odd_manifest(root) is not None:
            return _inspect_prepared(PreparedCheckpoint.open(root))
    with opened_source(checkpoint) as source:
        if any(file.name == MANIFEST for file in source.files()):
            return _inspect_prepared(PreparedCheckpoint.of(source.label, source))
        return _inspect_source(source, str(checkpoint) if on_disk else source.label)


def _inspect_source(source: Source, path: str) -> Inspection:
    surveyed = survey(source)
    index, found = surveyed.index, surveyed.found
    refusal = ""
    try:
        layers = tuple(_planned(plan) for plan in make_plan(source, surveyed=surveyed).layers)
    except OpenFilesError:
        raise
    except NvfpPrepError as error:  # convert would say this, with its default options
        refusal = str(error)
        layers = tuple(_preparable(source, layer, found.activations[layer.experts_path]) for layer in found.layers)
    others = [_other(finding, refused=bool(refusal)) for finding in found.others]
    configs = quantization_configs(index.config, index.hf_quant_config)
    return Inspection(
        **_facts(index),
        path=path,
        prepared=False,
        quantization=_short(next(iter(configs.values()), {})),
        layers=(*others, *layers),
        left_out=tuple(index.left_out),
        warnings=(*index.warnings, *found.warnings),
        refusal=refusal,
        left_out_reasons=dict(index.left_out),
    )


def _other(finding: LayerFinding, *, refused: bool) -> InspectedLayer:
    """Return a layer that is not prepared, of a checkpoint that convert refuses or not."""
    if finding.refused:
        status, reason = "refused", f"{finding.reason}. {finding.instead}"
    else:
        status, reason = "cannot be prepared" if refused else "passes through", finding.reason
    return InspectedLayer(experts_path=finding.experts_path, status=status, reason=reason)


def _planned(plan: LayerPlan) -> InspectedLayer:
    """Return a layer of a checkpoint that convert would take."""
    return InspectedLayer(
        **_shape(plan.source),
        status="can be prepared",
        activation=_activation_text(plan.activation),
        differing=len(plan.scalars.differing) if plan.source.gated else None,
        tp_sizes=plan.layout.tp_sizes(plan.dims),
    )


def _preparable(source: Source, layer: MoeLayer, activation: Activation) -> InspectedLayer:
    """Return a layer of a checkpoint that convert refuses, for this layer or another reason."""
    layout = ConvertOptions().layout_for(gated=layer.gated)
    status, reason, differing = "can be prepared", "", None
    try:
        scalars = read_scalars(source, [layer])[0]
        layout.check(layer.dims)
        differing = len(scalars.differing) if layer.gated else None
    except (NvfpPrepError, ValueError) as error:
        status, reason = "refused", str(error)
    return InspectedLayer(
        **_shape(layer),
        status=status,
        reason=reason,
        activation=_activation_text(activation),
        differing=differing,
        tp_sizes=layout.tp_sizes(layer.dims),
    )


def _inspect_prepared(checkpoint: PreparedCheckpoint) -> Inspection:
    with checkpoint as opened:
        manifest = opened.manifest
        layers = tuple(
            InspectedLayer(
                **_shape(record.source),
                status="prepared",
                activation=_activation_text(record.activation),
                differing=record.gate_up.differing if record.gated else None,
                tp_sizes=record.tp_sizes,
                gate_up_figures=dict(record.gate_up.figures),
            )
            for record in manifest.layers
        )
        passed = tuple(
            InspectedLayer(experts_path=where, status="passes through", reason=reason)
            for where, reason in manifest.passed.items()
        )
        return Inspection(
            **_facts(_read_prepared_index(opened)),
            path=str(opened.path),
            prepared=True,
            quantization=_short(next(iter(manifest.quantization.values()), {})),
            layers=layers + passed,
            prepared_as={
                "options": manifest.options.to_dict(),
                "tool_version": manifest.tool_version,
                "source": manifest.source,
                "revision": manifest.revision,
                "tp_sizes": list(manifest.tp_sizes),
            },
        )


def _read_prepared_index(checkpoint: PreparedCheckpoint) -> CheckpointIndex:
    """Return the index; raise :class:`SourceError` that says what the manifest knows, if a file is not as it says."""
    try:
        return read_index(checkpoint.files)
    except SourceError:
        problems = Problems()
        check_structure(checkpoint, problems)
        raise_damaged(checkpoint, problems, SourceError)
        raise


def _facts(index: CheckpointIndex) -> dict[str, Any]:
    """Return the facts that are read in the same way of every checkpoint."""
    architectures = index.config.get("architectures")
    return {
        "model_type": str(index.config.get("model_type", "")),
        "architectures": tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        "tensors": len(index.tensors),
        "shards": len(index.headers),
        "nbytes": sum(header.file_nbytes for header in index.headers.values()),
    }


def _shape(layer: MoeLayer) -> dict[str, Any]:
    return {
        "experts_path": layer.experts_path,
        "experts": layer.dims.experts,
        "intermediate": layer.dims.intermediate,
        "hidden": layer.dims.hidden,
        "gated": layer.gated,
        "format": layer.format,
    }


def _activation_text(activation: Activation) -> str:
    return activation.kind.value + (f" clamped at {activation.clamp:g}" if activation.clamp is not None else "")


def _short(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the lists of module names, which fill pages."""
    nested = config.get("quantization")
    flat = {**config, **nested} if isinstance(nested, dict) else dict(config)
    keys = ("quant_method", "quant_algo", "format", "group_size", "kv_cache_quant_algo", "producer")
    return {key: flat[key] for key in keys if key in flat}
