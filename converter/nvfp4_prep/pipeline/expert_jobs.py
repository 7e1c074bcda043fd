"""Source bytes of some experts to prepared bytes, proven on the spot.

One unit of work covers a range of experts of one prepared tensor: read, arrange, reconcile scales, apply the layout,
apply the inverse to the result and compare with what was read. So a wrong byte (a bug, bad memory) stops the
conversion before it is written. Peak memory of a unit: about four times its source bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from nvfp4_prep._util.buffers import byte_view, crc32_each, empty_like_pooled, same_bytes
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.errors import VerificationError
from nvfp4_prep.moe.expert_bytes import arrange_groups, read_experts
from nvfp4_prep.moe.gate_up_scales import measure, reconcile_expert
from nvfp4_prep.moe.layers import TensorGroup
from nvfp4_prep.moe.policy_errors import PolicyErrors
from nvfp4_prep.output.experts_fact import ExpertsFact, ReconciledExpert
from nvfp4_prep.pipeline.device import apply_layout
from nvfp4_prep.pipeline.jobs import UNIT_NBYTES, FileJob, Unit, UnitResult
from nvfp4_prep.planning.plan import LayerPlan, OutputFile
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, Projection

__all__ = [
    "expert_chunks",
    "experts_job",
    "prepare_and_prove",
    "prove",
    "reconcile_chunk",
    "source_block_scales_job",
]

_CPU = torch.device("cpu")


def expert_chunks(experts: int, expert_nbytes: int) -> Iterator[range]:
    """Yield ranges of experts that make units of about ``UNIT_NBYTES``."""
    step = max(1, UNIT_NBYTES // max(expert_nbytes, 1))
    for begin in range(0, experts, step):
        yield range(begin, min(begin + step, experts))


def prepare_and_prove(
    layout: MoeLayout,
    tensor: PreparedTensor,
    dims: MoeDims,
    parts: Sequence[torch.Tensor],
    where: str,
    device: torch.device = _CPU,
) -> torch.Tensor:
    """Apply a layout to some experts, and its inverse to the result.

    Args:
        layout, tensor, dims: what to make.
        parts: one ``uint8 [n, rows, bytes per row]`` on the CPU for each of ``layout.projections(tensor)``.
        where: for the error.
        device: where the layout is applied; the inverse always runs on the CPU.

    Returns:
        ``uint8 [n, rows, bytes per row]`` on the CPU, contiguous.

    Raises:
        VerificationError: if the inverse does not give ``parts`` back.
    """
    prepared = apply_layout(layout, tensor, dims, parts, device)
    prove(layout, tensor, dims, parts, prepared, where)
    return prepared


def prove(
    layout: MoeLayout,
    tensor: PreparedTensor,
    dims: MoeDims,
    parts: Sequence[torch.Tensor],
    prepared: torch.Tensor,
    where: str,
) -> None:
    """Raise :class:`VerificationError` unless the layout's inverse gives the parts back from prepared experts."""
    for before, after in zip(parts, layout.invert(tensor, prepared, dims, empty_like_pooled), strict=True):
        if not same_bytes(before, after):
            raise VerificationError(
                "the inverse transform does not give the source bytes back",
                where=where,
                next_step="Nothing wrong was written. Check this machine's memory, and report it if it repeats.",
            )


def experts_job(plan: LayerPlan, file: OutputFile, source: Source, device: torch.device) -> FileJob:
    """Return the job that writes a layer's file (or one of its parts), prepared on ``device``."""

    def units() -> Iterator[Unit]:
        for tensor, record in zip(file.tensors, file.records, strict=True):
            groups = plan.groups_for(tensor)
            experts = plan.dims.experts
            nbytes = sum(group.expert_range(0, experts).nbytes for group in groups)
            for chunk in expert_chunks(experts, nbytes):
                yield Unit(
                    len(chunk) * nbytes,
                    partial(_prepare, plan, tensor, record, chunk, source, device),
                    partial(_read_ahead, source, groups, chunk, experts),
                )

    return FileJob(file.name, file.nbytes, file.header, units)


def _read_ahead(source: Source, groups: Sequence[TensorGroup], chunk: range, experts: int) -> None:
    for group in groups:
        for expert in chunk:
            byte_range = group.expert_range(expert, experts)
            source.will_read(byte_range.file, byte_range.offset_bytes, byte_range.nbytes)


def _prepare(
    plan: LayerPlan,
    tensor: PreparedTensor,
    record: TensorRecord,
    chunk: range,
    source: Source,
    device: torch.device,
) -> UnitResult:
    layer, layout = plan.source, plan.layout
    groups = layer.groups_for(layout, tensor)
    raws = [read_experts(source, group, chunk, layer.dims.experts) for group in groups]
    parts = arrange_groups(groups, raws, layout.projections(tensor))
    reconciled: tuple[ReconciledExpert, ...] = ()
    errors: tuple[PolicyErrors, ...] = ()
    if tensor is PreparedTensor.W13_WEIGHT:
        errors = _measure_chunk(plan, parts, chunk, source)
    if tensor is PreparedTensor.W13_WEIGHT_SCALE:
        parts, reconciled = reconcile_chunk(plan, parts, chunk)
    where = f"{layer.prepared_name(tensor)}, experts {chunk.start} to {chunk.stop - 1}"
    prepared = prepare_and_prove(layout, tensor, layer.dims, parts, where, device)
    begin = record.offset_bytes + chunk.start * layout.expert_nbytes(tensor, layer.dims)
    crc32 = crc32_each(prepared)
    return UnitResult(
        pieces=[(begin, byte_view(prepared))],
        digests=[(group.key, byte_view(raw)) for group, raw in zip(groups, raws, strict=True)],
        fact=ExpertsFact(tensor, tuple(crc32), reconciled, errors),
    )


def _measure_chunk(
    plan: LayerPlan, parts: list[torch.Tensor], chunk: range, source: Source
) -> tuple[PolicyErrors, ...]:
    """Return the errors of each expert of the chunk whose gate and up scales differ.

    Done while the codes are at hand: the block scales that it needs besides are an eighth of their size.
    """
    gates = plan.scalars.gate_scale_2 or ()
    groups = plan.groups_for(PreparedTensor.W13_WEIGHT_SCALE)
    errors = []
    for expert in plan.scalars.differing:
        if expert not in chunk:
            continue
        raws = [read_experts(source, group, range(expert, expert + 1), plan.dims.experts) for group in groups]
        gate, up = (part[0] for part in arrange_groups(groups, raws, (Projection.GATE, Projection.UP)))
        outcome = reconcile_expert(plan.scalars, expert, gate, up)
        scales = (gates[expert], plan.scalars.up_scale_2[expert])
        codes = (parts[0][expert - chunk.start], parts[1][expert - chunk.start])
        errors.append(measure(codes, (gate, up), scales, outcome))
    return tuple(errors)


def reconcile_chunk(
    plan: LayerPlan, parts: list[torch.Tensor], chunk: range
) -> tuple[list[torch.Tensor], tuple[ReconciledExpert, ...]]:
    """Rescale the block scales of the chunk's reconciled experts.

    Args:
        plan: says which experts.
        parts: block scales of gate and up, or of up alone, ``uint8 [n, I, H/16]``; never changed in place.
        chunk: the experts that they belong to.

    Returns:
        The parts to prepare, and for each rescaled expert what was done to it.
    """
    affected = [expert for expert in plan.reconciled if expert in chunk]
    if not affected:
        return parts, ()
    gate, up = (part.clone() for part in parts)
    facts = []
    for expert in affected:
        row = expert - chunk.start
        outcome = reconcile_expert(plan.scalars, expert, gate[row], up[row])
        (gate if outcome.side is Projection.GATE else up)[row] = outcome.block_scales
        figures = (outcome.rounded, outcome.underflowed, outcome.worst_relative)
        facts.append(ReconciledExpert(expert, outcome.side, *figures))
    return [gate, up], tuple(facts)


def source_block_scales_job(plan: LayerPlan, file: OutputFile, source: Source) -> FileJob:
    """Return the job that keeps the original block scales of rescaled projections, for restore."""
    layer = plan.source
    groups = layer.groups_for(plan.layout, PreparedTensor.W13_WEIGHT_SCALE)
    (scales,) = file.records

    def work(position: int, expert: int) -> UnitResult:
        chunk = range(expert, expert + 1)
        raws = [read_experts(source, group, chunk, layer.dims.experts) for group in groups]
        gate, up = (part[0] for part in arrange_groups(groups, raws, (Projection.GATE, Projection.UP)))
        outcome = reconcile_expert(plan.scalars, expert, gate, up)
        original = (gate if outcome.side is Projection.GATE else up).contiguous()
        data = byte_view(original)
        return UnitResult(pieces=[(scales.offset_bytes + position * len(data), data)])

    def units() -> Iterator[Unit]:
        nbytes = sum(group.expert_range(0, layer.dims.experts).nbytes for group in groups)
        for position, expert in enumerate(plan.reconciled):
            yield Unit(nbytes, partial(work, position, expert))

    return FileJob(file.name, file.nbytes, file.header, units)
