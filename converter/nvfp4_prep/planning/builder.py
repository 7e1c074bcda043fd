"""Planning: from a source and options to a :class:`~nvfp4_prep.planning.plan.Plan`, without writing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nvfp4_prep._util.collector import collector_paused
from nvfp4_prep._util.steps import step
from nvfp4_prep._util.text import and_more
from nvfp4_prep.checkpoint.filenames import (
    CONFIG,
    INDEX,
    MANIFEST,
    README,
    FileKind,
    restored_shards,
)
from nvfp4_prep.checkpoint.index import CheckpointIndex
from nvfp4_prep.checkpoint.source import Source, SourceFile
from nvfp4_prep.errors import SourceError, UnsupportedCheckpointError, UsageError
from nvfp4_prep.layouts import LAYOUTS, LayoutName
from nvfp4_prep.moe.activation import Activation, ActivationKind
from nvfp4_prep.moe.discovery import FoundLayers, LayerFinding
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.moe.scalar_reader import read_scalars
from nvfp4_prep.moe.scalars import LayerScalars
from nvfp4_prep.options import ConvertOptions, GateUpPolicy
from nvfp4_prep.planning.output_bounds import check_header, check_made_files
from nvfp4_prep.planning.output_files import in_shard_order, layer_files, passthrough_files, scale_files
from nvfp4_prep.planning.plan import LayerPlan, OutputFile, Plan
from nvfp4_prep.planning.survey import Survey, survey
from nvfp4_prep_kernels import LayoutError

__all__ = ["check_batched", "make_plan"]


@collector_paused()
def make_plan(source: Source, options: ConvertOptions | None = None, surveyed: Survey | None = None) -> Plan:
    """Plan a conversion: read headers and scalars, write nothing.

    Args:
        source: the checkpoint.
        options: what the output's bytes depend on.
        surveyed: the source's survey, where the caller has made it already.

    Raises:
        SourceError: if the source cannot be read.
        UnsupportedCheckpointError: if it holds nothing to prepare, or a layer that must be refused.
        UsageError: if the options do not fit the checkpoint.
    """
    options = options or ConvertOptions()
    with step("survey of the source"):
        surveyed = surveyed or survey(source)
    index, found = surveyed.index, surveyed.found
    _check_supported(source, index, found)
    scalars = read_scalars(source, found.layers)
    layers = tuple(
        _plan_layer(layer, values, options, found.activations[layer.experts_path])
        for layer, values in zip(found.layers, scalars, strict=True)
    )
    files = (*in_shard_order([*layer_files(layers), *passthrough_files(index, layers)]), *scale_files(layers))
    _check_names(files, index.side_files)
    served = (record for file in files if file.served for record in file.records)
    check_made_files(source.where(), served, index.texts)
    used = {*index.headers, *index.texts, *(file.name for file in index.side_files)}
    return Plan(
        source_label=source.label,
        source_revision=source.revision,
        source_files=tuple(file for file in source.files() if file.name in used),
        options=options,
        index=index,
        layers=layers,
        others=found.others,
        files=files,
        side_files=index.side_files,
        warnings=(*index.warnings, *found.warnings),
    )


def _check_supported(source: Source, index: CheckpointIndex, found: FoundLayers) -> None:
    """Raise :class:`UnsupportedCheckpointError` for a checkpoint that cannot be converted."""
    label = source.where()
    whole = any(file.name == MANIFEST for file in source.files())
    nested = [index.config, *(value for value in index.config.values() if isinstance(value, Mapping))]
    stamped = [config.get("quantization_config") for config in nested]
    prepared = next((name for name in index.tensors if name.endswith(".routed_experts.w13_weight")), None)
    if prepared or any(isinstance(value, Mapping) and value.get("quant_method") == "nvfp4_prep" for value in stamped):
        raise UnsupportedCheckpointError(
            "is prepared already" + (f" (it holds {prepared})" if prepared else " (config.json is stamped)"),
            where=label,
            next_step=(
                "Serve it, `nvfp4-prep restore` it, or change its layout with `nvfp4-prep relayout`."
                if whole
                else f"Its {MANIFEST} is missing: copy or download the whole checkpoint, or convert its source again."
            ),
        )
    if whole:
        raise UnsupportedCheckpointError(
            f"holds {MANIFEST}, which only prepared checkpoints have",
            where=label,
            next_step="Give what it was made from, or, if this is a source, rename that file.",
        )
    if found.refused:
        first = found.refused[0]
        more = and_more(len(found.refused) - 1, "layer")
        raise UnsupportedCheckpointError(f"{first.reason}{more}", where=first.experts_path, next_step=first.instead)
    if found.layers:
        return
    if not found.passed:
        raise UnsupportedCheckpointError(
            "holds no tensors of routed experts",
            where=label,
            next_step="Only mixture-of-experts checkpoints can be prepared. If this is one, its tensor names are not"
            " known yet: docs/adding-a-format.md shows how to add them.",
        )
    reasons: dict[str, LayerFinding] = {}
    for finding in found.passed:
        reasons.setdefault(finding.reason, finding)
    raise UnsupportedCheckpointError(
        "holds no NVFP4 experts to prepare: "
        + "; ".join(f"{finding.reason} ({finding.experts_path})" for finding in reasons.values()),
        where=label,
        next_step=next(iter(reasons.values())).instead,
    )


def _plan_layer(layer: MoeLayer, scalars: LayerScalars, options: ConvertOptions, activation: Activation) -> LayerPlan:
    restored = [record for group in layer.groups for record in group.records]  # restore writes one file a layer
    check_header(f"restored {layer.experts_path}", len(restored), sum(len(record.shape) for record in restored))
    check_batched(layer, activation, options)
    try:
        layout = options.layout_for(gated=layer.gated)
        layout.check(layer.dims)
    except (LayoutError, UsageError) as error:
        raise UnsupportedCheckpointError(
            str(error),
            where=layer.experts_path,
            next_step=f"Give another {'--layout' if options.moe_tp == 1 else '--moe-tp'}, or serve the source.",
        ) from error
    differing = scalars.differing
    if differing and options.gate_up_scales is GateUpPolicy.ERROR:
        raise UnsupportedCheckpointError(
            f"gate and up projections of {len(differing)} of {layer.dims.experts} experts have different global scales",
            where=layer.experts_path,
            next_step=_instead_of_error(layer, options),
        )
    return LayerPlan(layer, layout, activation, scalars, options.reconciled(differing))


def _instead_of_error(layer: MoeLayer, options: ConvertOptions) -> str:
    """Return what to give in the place of ``--gate-up-scales error``."""
    if options.layout is LayoutName.TRTLLM:
        return "Leave --gate-up-scales out: this layout keeps both scales as they are."
    two_scales = ConvertOptions(layout=LayoutName.TRTLLM, moe_tp=options.moe_tp).layout_for(gated=True)
    try:
        two_scales.check(layer.dims)
        keep_both = "--layout trtllm without --gate-up-scales (keeps both scales as they are), or "
    except LayoutError:
        keep_both = ""
    return f"Use {keep_both}--gate-up-scales reconcile (rescale one side) or vllm (take gate's, as vLLM does)."


def check_batched(layer: MoeLayer, activation: Activation, options: ConvertOptions) -> None:
    """Refuse what vLLM's FlashInferCuteDSLBatchedExperts does not compute: it knows plain SiLU only."""
    plain = activation.kind is ActivationKind.SILU and activation.clamp is None
    facts = LAYOUTS[options.layout]
    if facts.plain_silu_only and not plain:
        clamp = f" clamped at {activation.clamp:g}" if activation.clamp is not None else ""
        raise UnsupportedCheckpointError(
            f"the {facts.kernel} kernel computes plain SiLU only, these experts have {activation.kind.value}{clamp}",
            where=layer.experts_path,
            next_step="Use --layout cutedsl.",
        )


def _check_names(files: Sequence[OutputFile], side_files: Sequence[SourceFile]) -> None:
    """Raise :class:`SourceError` where names of the source are those that the output needs, or restore after it."""
    found: dict[str, str] = {}
    for file in files:
        for record in file.records:
            if record.name in found:
                raise SourceError(
                    f"tensor {record.name!r} has the name of one that would be made",
                    where=f"{found[record.name]} and {file.name} of the output",
                    next_step="Rename it: no server would read a prepared checkpoint's name in a source.",
                )
            found[record.name] = file.name
    taken = {*(file.name for file in files), CONFIG, INDEX, README, MANIFEST}
    layers = {file.layer_position for file in files if file.kind is FileKind.EXPERTS}
    restored = restored_shards(len(layers) + sum(file.kind is FileKind.PASSTHROUGH for file in files))
    for side in side_files:
        folder = side.name.split("/")[0]
        if folder in taken or folder in restored:
            which = "the output" if folder in taken else "what restore would write"
            raise SourceError(f"folder has the name of a file of {which}", where=side.name, next_step="Rename it.")
