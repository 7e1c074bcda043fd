"""Output files of a conversion: which tensors each one holds, in what order, and which shards it needs."""

from __future__ import annotations

from nvfp4_prep.checkpoint.filenames import EXPERT_SCALES, EXPERTS_PREFIX, SOURCE_SCALES, FileKind, numbered_shard
from nvfp4_prep.checkpoint.index import CheckpointIndex
from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.tensors import DTYPE_BITS, TensorRecord, TensorSpec
from nvfp4_prep.errors import SourceError
from nvfp4_prep.moe.layers import SOURCE_BLOCK_SCALE
from nvfp4_prep.planning.output_bounds import check_header
from nvfp4_prep.planning.plan import LayerPlan, OutputFile
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["in_shard_order", "layer_files", "passthrough_files", "scale_files"]

MAX_LAYER_FILE_NBYTES = 45_000_000_000
MAX_PASSTHROUGH_FILE_NBYTES = 5_000_000_000
MAX_PASSTHROUGH_SHARDS = 4
"""A passed-through file draws on at most so many shards, so that a source that is downloaded can be deleted early."""


def layer_files(layers: tuple[LayerPlan, ...]) -> list[OutputFile]:
    """Return the files of the experts, and of the original block scales where some are rescaled."""
    files = []
    labels = _labels(layers)
    for position, plan in enumerate(layers):
        stored = plan.stored_tensors()
        parts = _split_tensors(plan)
        for number, tensors in enumerate(parts, 1):
            part = f"-part-{number:02d}-of-{len(parts):02d}" if len(parts) > 1 else ""
            name = f"{EXPERTS_PREFIX}{labels[position]}{part}.safetensors"
            specs = [stored[tensor] for tensor in tensors]
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
    """Return layer numbers for file names; a second module of one number (MTP beside the model) gets a suffix."""
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
    specs = [TensorSpec(plan.prepared_name(SOURCE_BLOCK_SCALE), dtype, (count, rows, cols))]
    shards = frozenset(
        record.file for group in plan.groups_for(PreparedTensor.W13_WEIGHT_SCALE) for record in group.records
    )
    name = f"source-block-scales-layer-{label}.safetensors"
    return _file(name, FileKind.SOURCE_BLOCK_SCALES, specs, shards, layer_position=position, served=False)


def passthrough_files(index: CheckpointIndex, layers: tuple[LayerPlan, ...]) -> list[OutputFile]:
    """Return the files of the tensors that are copied as they are."""
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
        name = numbered_shard(number, len(bundles))
        needs = frozenset(record.file for record in bundle)
        files.append(_file(name, FileKind.PASSTHROUGH, specs, needs, copies=tuple(bundle)))
    return files


def scale_files(layers: tuple[LayerPlan, ...]) -> list[OutputFile]:
    """Return the file of all scale vectors that a server reads, and that of the source's scalars."""
    vectors = [plan.stored_tensors()[vector] for plan in layers for vector in plan.layout.scale_vectors]
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


def in_shard_order(files: list[OutputFile]) -> list[OutputFile]:
    """Return files in the order in which the shards (by name) complete them: each is needed for a short time."""
    return sorted(files, key=lambda file: (max(file.shards, default=""), min(file.shards, default=""), file.name))
