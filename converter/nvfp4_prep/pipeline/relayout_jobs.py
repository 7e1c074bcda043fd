"""Jobs that make a prepared layer's files in another layout from its prepared files, without the source.

Bytes that only move inside tiles of 128 rows are moved tile by tile; everything else is inverted and prepared again.
Either way the old bytes are checked against their checksums, inverted, digested as the source's tensors, and the new
bytes are inverted and compared before they are written. Peak memory of a unit: about four times its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from nvfp4_prep._util.buffers import byte_view, crc32_each, empty_like_pooled
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.errors import VerificationError
from nvfp4_prep.moe.gate_up_scales import reconcile_expert
from nvfp4_prep.output.experts_fact import ExpertsFact, ReconciledExpert
from nvfp4_prep.pipeline.expert_jobs import expert_chunks, prepare_and_prove, prove, reconcile_chunk
from nvfp4_prep.pipeline.jobs import FileJob, Unit, UnitResult
from nvfp4_prep.planning.plan import LayerPlan, OutputFile
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.inverse import source_bytes, with_original_scales
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep_kernels import PreparedTensor, Projection
from nvfp4_prep_kernels.tile_relayout import can_relayout, keeps_tiles, relayout_tiles

__all__ = ["LayerRelayout", "damaged"]

Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LayerRelayout:
    """One layer on its way from one layout to another.

    Attributes:
        checkpoint: holds the old layer.
        old: the layer as the checkpoint has it.
        new: the layer in the other layout; its groups have no records, because the source is not here.
    """

    checkpoint: PreparedCheckpoint
    old: LayerRecord
    new: LayerPlan

    @property
    def rescales_anew(self) -> bool:
        """Whether other experts' block scales are rescaled than before: one layout takes two global scales, one not."""
        return self.new.reconciled != self.old.gate_up.reconciled_experts

    def experts_job(self, file: OutputFile) -> FileJob:
        """Return the job that writes a file of the layer's big tensors."""
        return FileJob(file.name, file.nbytes, file.header, partial(self._units, file))

    def block_scales_job(self, file: OutputFile) -> FileJob:
        """Return the job that keeps the original block scales of experts that are rescaled now."""
        (record,) = file.records

        def units() -> Iterator[Unit]:
            nbytes = self.old.layout.expert_nbytes(PreparedTensor.W13_WEIGHT_SCALE, self.old.dims)
            for position, expert in enumerate(self.new.reconciled):
                yield Unit(nbytes, partial(self._keep_original, record, position, expert))

        return FileJob(file.name, file.nbytes, file.header, units)

    def _units(self, file: OutputFile) -> Iterator[Unit]:
        for tensor, record in zip(file.tensors, file.records, strict=True):
            nbytes = self.new.layout.expert_nbytes(tensor, self.new.dims)
            for chunk in expert_chunks(self.new.dims.experts, nbytes):
                yield Unit(len(chunk) * nbytes, partial(self._convert, tensor, record, chunk))

    def _convert(self, tensor: PreparedTensor, record: TensorRecord, chunk: range) -> UnitResult:
        new, where = self.new, self._where(tensor, chunk)
        stored, served, source = self._read(tensor, chunk)
        reconciled: tuple[ReconciledExpert, ...] = ()
        if tensor is PreparedTensor.W13_WEIGHT_SCALE and self.rescales_anew:
            parts, reconciled = reconcile_chunk(new, list(source), chunk)
            prepared = prepare_and_prove(new.layout, tensor, new.dims, parts, where)
        elif self._stays_in_tiles(tensor):
            prepared = self._moved_in_tiles(tensor, stored)
            prove(new.layout, tensor, new.dims, served, prepared, where)
        else:
            prepared = prepare_and_prove(new.layout, tensor, new.dims, served, where)
        raws = source_bytes(self.old, tensor, source)
        begin = record.offset_bytes + chunk.start * new.layout.expert_nbytes(tensor, new.dims)
        return UnitResult(
            pieces=[(begin, byte_view(prepared))],
            digests=[(group.key, byte_view(raw)) for group, raw in raws],
            fact=ExpertsFact(tensor, tuple(crc32_each(prepared)), reconciled),
        )

    def _read(self, tensor: PreparedTensor, chunk: range) -> tuple[torch.Tensor, Parts, Parts]:
        """Return the stored bytes of some experts, the projections that they stand for, and those of the source.

        The two differ in block scales that were rescaled.
        """
        where, old = self._where(tensor, chunk), self.old
        file = self.checkpoint.tensor_record(old, tensor).file
        stored = self.checkpoint.read_prepared(old, tensor, chunk)
        for expert in self.checkpoint.damaged_experts(old, tensor, chunk, stored):
            raise damaged(f"bytes of expert {expert} differ from what was written", where, file)
        try:
            served = old.layout.invert(tensor, stored, old.dims, empty_like_pooled)
            return stored, served, with_original_scales(self.checkpoint, old, tensor, chunk, served)
        except ValueError as error:
            raise damaged(str(error), where, file) from error

    def _stays_in_tiles(self, tensor: PreparedTensor) -> bool:
        """Return whether bytes only move inside tiles, and moving them there is the fastest way.

        It is not for scales, which the layout's own functions move three times as fast, unless nothing moves at all.
        """
        old, new, dims = self.old.layout, self.new.layout, self.new.dims
        if old.stored_shape(tensor, dims) != new.stored_shape(tensor, dims) or not can_relayout(old, new, tensor):
            return False
        return not tensor.is_scale or keeps_tiles(old, new, tensor)

    def _moved_in_tiles(self, tensor: PreparedTensor, stored: torch.Tensor) -> torch.Tensor:
        if keeps_tiles(self.old.layout, self.new.layout, tensor):
            return stored
        out = empty_like_pooled(stored.shape, stored)
        return relayout_tiles(tensor, stored, self.old.layout, self.new.layout, out)

    def _keep_original(self, record: TensorRecord, position: int, expert: int) -> UnitResult:
        _, _, source = self._read(PreparedTensor.W13_WEIGHT_SCALE, range(expert, expert + 1))
        gate, up = (part[0] for part in source)
        outcome = reconcile_expert(self.new.scalars, expert, gate, up)
        original = (gate if outcome.side is Projection.GATE else up).contiguous()
        data = byte_view(original)
        return UnitResult(pieces=[(record.offset_bytes + position * len(data), data)])

    def _where(self, tensor: PreparedTensor, chunk: range) -> str:
        return f"{self.new.prepared_name(tensor)}, experts {chunk.start} to {chunk.stop - 1}"


def damaged(what: str, where: str, file: str) -> VerificationError:
    """Return the error for a checkpoint of which one file is not what its manifest says."""
    return VerificationError(what, where=where, next_step=f"{renewal(file)} Then run relayout with --restart.")
