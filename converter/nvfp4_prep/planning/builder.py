"""Planning: from a source and options to a :class:`~nvfp4_prep.planning.plan.Plan`, without writing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nvfp4_prep._util.collector import collector_paused
from nvfp4_prep._util.text import count
from nvfp4_prep.checkpoint.filenames import (
    CONFIG,
    EXPERT_SCALES,
    EXPERTS_PREFIX,
    INDEX,
    MANIFEST,
    README,
    SOURCE_SCALES,
    FileKind,
    restored_shards,
)
from nvfp4_prep.checkpoint.index import CheckpointIndex
from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.source import Source, SourceFile, place_of
from nvfp4_prep.checkpoint.tensors import DTYPE_BITS, TensorRecord, TensorSpec
from nvfp4_prep.errors import SourceError, UnsupportedCheckpointError, UsageError
from nvfp4_prep.moe.activation import Activation, ActivationKind
from nvfp4_prep.moe.discovery import FoundLayers, LayerFinding
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.moe.scalars import LayerScalars, read_scalars
from nvfp4_prep.options import ConvertOptions, GateUpPolicy, LayoutName
from nvfp4_prep.planning.output_bounds import check_header, check_made_files
from nvfp4_prep.planning.plan import LayerPlan, OutputFile, Plan
from nvfp4_prep.planning.survey import Survey, survey
from nvfp4_prep_kernels import LayoutError, PreparedTensor

__all__ = ["check_batched", "layer_files", "make_plan", "scale_files"]

MAX_LAYER_FILE_NBYTES = 45_000_000_000
MAX_PASSTHROUGH_FILE_NBYTES = 5_000_000_000
MAX_PASSTHROUGH_SHARDS = 4
"""A passed-through file draws on at most so many shards, so that a source that is downloaded can be deleted early."""


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
    surveyed = surveyed or survey(source)
    index, found = surveyed.index, surveyed.found
    _check_supported(place_of(source), index, found)
    scalars = read_scalars(source, found.layers)
    layers = tuple(
        _plan_layer(layer, values, options, found.activations[layer.experts_path])
        for layer, values in zip(found.layers, scalars, strict=True)
    )
    files = (*_order([*layer_files(layers), *_passthrough_files(index, layers)]), *scale_files(layers))
    _check_names(files, index.side_files)
    served = (record for file in files if file.served for record in file.records)
    check_made_files(place_of(source), served, index.texts)
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


def _check_supported(label: str, index: CheckpointIndex, found: FoundLayers) -> None:
    """Raise :class:`UnsupportedCheckpointError` for a checkpoint that cannot be converted."""
    nested = [index.config, *(value for value in index.config.values() if isinstance(value, Mapping))]
    stamped = [config.get("quantization_config") for config in nested]
    prepared = next((name for name in index.tensors if name.endswith(".routed_experts.w13_weight")), None)
    if prepared or any(isinstance(value, Mapping) and value.get("quant_method") == "nvfp4_prep" for value in stamped):
        raise UnsupportedCheckpointError(
            "is prepared already" + (f" (it holds {prepared})" if prepared else " (config.json is stamped)"),
            where=label,
            next_step="Serve it, `nvfp4-prep restore` it, or change its layout with `nvfp4-prep relayout`.",
        )
    if found.refused:
        first = found.refused[0]
        more = f" (and {count(len(found.refused) - 1, 'more layer')})" if len(found.refused) > 1 else ""
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
            next_step="Give another --layout or --moe-tp, or serve the source as it is.",
        ) from error
    differing = scalars.differing
    if differing and options.gate_up_scales is GateUpPolicy.ERROR:
        raise UnsupportedCheckpointError(
            f"gate and up projections of {len(differing)} of {layer.dims.experts} experts have different global scales",
            where=layer.experts_path,
            next_step="Use --gate-up-scales reconcile (rescale one side) or vllm (take gate's, as vLLM does).",
        )
    return LayerPlan(layer, layout, activation, scalars, options.reconciled(differing))


def check_batched(layer: MoeLayer, activation: Activation, options: ConvertOptions) -> None:
    """Refuse what vLLM's FlashInferCuteDSLBatchedExperts does not compute: it knows plain SiLU only."""
    plain = activation.kind is ActivationKind.SILU and activation.clamp is None
    if options.layout is LayoutName.CUTEDSL_BATCHED and not plain:
        clamp = f" clamped at {activation.clamp:g}" if activation.clamp is not None else ""
        raise UnsupportedCheckpointError(
            f"the batched kernel computes plain SiLU only, these experts have {activation.kind.value}{clamp}",
            where=layer.experts_path,
            next_step="Use --layout cutedsl.",
        )


def layer_files(layers: tuple[LayerPlan, ...]) -> list[OutputFile]:
    """Return the files of the experts, and of the original block scales where some are rescaled."""
    files = []
    labels = _labels(layers)
    for position, plan in enumerate(layers):
        dims = plan.dims
        parts = _split_tensors(plan)
        for number, tensors in enumerate(parts, 1):
            part = f"-part-{number:02d}-of-{len(parts):02d}" if len(parts) > 1 else ""
            name = f"{EXPERTS_PREFIX}{labels[position]}{part}.safetensors"
            specs = [
                TensorSpec(
                    plan.prepared_name(tensor),
                    tensor.dtype,
                    plan.layout.stored_shape(tensor, dims),
                )
                for tensor in tensors
            ]
            read = list(tensors)
            if PreparedTensor.W13_WEIGHT in tensors and plan.scalars.differing:
                read.append(PreparedTensor.W13_WEIGHT_SCALE)  # to measure what the policies do to the weights
            shards = frozenset(
                record.file for tensor in read for group in plan.groups_for(tensor) for record in group.records
            )
            files.append(_file(name, FileKind.EXPERTS, specs, shards, layer_position=position, tensors=tuple(tensors)))
        if plan.reconciled:
            files.append(_block_scales_file(plan, position, labels[position]))
    return files


def _labels(layers: tuple[LayerPlan, ...]) -> list[str]:
    """Layer numbers for file names; a second module with the same number (MTP beside the model) gets a suffix."""
    seen: dict[int, int] = {}
    labels = []
    for plan in layers:
        again = seen.get(plan.index, 0)
        seen[plan.index] = again + 1
        labels.append(f"{plan.index:05d}" + (f"-{again + 1}" if again else ""))
    return labels


def _split_tensors(plan: LayerPlan) -> list[list[PreparedTensor]]:
    """Return the four tensors, in as few files as the size limit allows."""
    parts: list[list[PreparedTensor]] = [[]]
    size = 0
    for tensor in PreparedTensor:
        nbytes = plan.dims.experts * plan.layout.expert_nbytes(tensor, plan.dims)
        if parts[-1] and size + nbytes > MAX_LAYER_FILE_NBYTES:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += nbytes
    return parts


def _block_scales_file(plan: LayerPlan, position: int, label: str) -> OutputFile:
    """Return the original block scales of rescaled projections, which restore needs because rounding loses them."""
    rows, cols = plan.layout.source_shape(PreparedTensor.W13_WEIGHT_SCALE, plan.dims)
    count = len(plan.reconciled)
    dtype = PreparedTensor.W13_WEIGHT_SCALE.dtype
    specs = [TensorSpec(plan.prepared_name("source_block_scale"), dtype, (count, rows, cols))]
    shards = frozenset(
        record.file for group in plan.groups_for(PreparedTensor.W13_WEIGHT_SCALE) for record in group.records
    )
    name = f"source-block-scales-layer-{label}.safetensors"
    return _file(name, FileKind.SOURCE_BLOCK_SCALES, specs, shards, layer_position=position, served=False)


def _passthrough_files(index: CheckpointIndex, layers: tuple[LayerPlan, ...]) -> list[OutputFile]:
    prepared = {record.name for plan in layers for group in plan.groups for record in group.records}
    bundles: list[list[TensorRecord]] = []
    size, shards = 0, set[str]()
    for header in index.headers.values():
        for record in header.tensors:
            if record.name in prepared:
                continue
            too_large = size + record.nbytes > MAX_PASSTHROUGH_FILE_NBYTES
            if not bundles or too_large or len(shards | {record.file}) > MAX_PASSTHROUGH_SHARDS:
                bundles.append([])
                size, shards = 0, set()
            bundles[-1].append(record)
            size += record.nbytes
            shards.add(record.file)
    files = []
    for number, bundle in enumerate(bundles, 1):
        # Wide elements first keeps every tensor aligned to its element size.
        bundle.sort(key=lambda record: -DTYPE_BITS[record.dtype])
        specs = [TensorSpec(record.name, record.dtype, record.shape) for record in bundle]
        name = f"model-{number:05d}-of-{len(bundles):05d}.safetensors"
        needs = frozenset(record.file for record in bundle)
        files.append(_file(name, FileKind.PASSTHROUGH, specs, needs, copies=tuple(bundle)))
    return files


def scale_files(layers: tuple[LayerPlan, ...]) -> list[OutputFile]:
    """Return the file of all scale vectors that a server reads, and that of the source's scalars."""
    vectors = [
        TensorSpec(plan.prepared_name(vector), "F32", (plan.dims.experts,))
        for plan in layers
        for vector in plan.layout.scale_vectors
    ]
    scalars = [
        TensorSpec(group.key, "F32", (len(plan.scalars.raw[group.key]) // 4,))
        for plan in layers
        for group in plan.groups
        if group.leaf.is_scalar
    ]
    return [
        _file(EXPERT_SCALES, FileKind.EXPERT_SCALES, vectors, frozenset()),
        _file(SOURCE_SCALES, FileKind.SOURCE_SCALES, scalars, frozenset(), served=False),
    ]


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


def _file(
    name: str,
    kind: FileKind,
    specs: list[TensorSpec],
    shards: frozenset[str],
    *,
    layer_position: int | None = None,
    tensors: tuple[PreparedTensor, ...] = (),
    copies: tuple[TensorRecord, ...] = (),
    served: bool = True,
) -> OutputFile:
    check_header(name, len(specs), sum(len(spec.shape) for spec in specs))
    try:
        header, records = encode_header(name, specs, {"format": "pt"})
    except ValueError as error:
        raise SourceError(f"its tensors cannot be written ({error})") from error
    nbytes = len(header) + sum(spec.nbytes for spec in specs)
    return OutputFile(name, kind, header, records, nbytes, shards, layer_position, tensors, copies, served)


def _order(files: list[OutputFile]) -> list[OutputFile]:
    """Files in the order in which the shards (by name) complete them, so that each shard is needed for a short time."""
    return sorted(files, key=lambda file: (max(file.shards, default=""), min(file.shards, default=""), file.name))
