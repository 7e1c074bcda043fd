"""Reading the per-expert scalars of all layers of a source, with few, merged reads."""

from __future__ import annotations

from collections.abc import Sequence

from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.moe.scalars import LayerScalars, interpret_scalars

__all__ = ["read_scalars"]

_MERGE_GAP_NBYTES = 1 << 16
_MERGE_LIMIT_NBYTES = 1 << 24


def read_scalars(source: Source, layers: Sequence[MoeLayer]) -> list[LayerScalars]:
    """Read the scalars of all layers with few, merged reads.

    Raises:
        UnsupportedCheckpointError: as :func:`~nvfp4_prep.moe.scalars.interpret_scalars`.
    """
    wanted = [record for layer in layers for group in layer.groups if group.leaf.is_scalar for record in group.records]
    data = _peek_merged(source, wanted)
    found = []
    for layer in layers:
        raw = {
            group.key: b"".join(data[record.name] for record in group.records)
            for group in layer.groups
            if group.leaf.is_scalar
        }
        found.append(interpret_scalars(layer, raw))
    return found


def _peek_merged(source: Source, records: Sequence[TensorRecord]) -> dict[str, bytes]:
    """Return bytes by tensor name; records that lie close together are read at once."""
    found: dict[str, bytes] = {}
    run: list[TensorRecord] = []

    def flush() -> None:
        if not run:
            return
        begin, end = run[0].offset_bytes, run[-1].offset_bytes + run[-1].nbytes
        data = source.peek(run[0].file, begin, end - begin)
        for record in run:
            at = record.offset_bytes - begin
            found[record.name] = data[at : at + record.nbytes]
        run.clear()

    for record in sorted(records, key=lambda record: (record.file, record.offset_bytes)):
        if run:
            end = run[-1].offset_bytes + run[-1].nbytes
            apart = record.file != run[0].file or record.offset_bytes - end > _MERGE_GAP_NBYTES
            if apart or record.offset_bytes - run[0].offset_bytes > _MERGE_LIMIT_NBYTES:
                done = run[0].file
                flush()
                if record.file != done:
                    source.release(done)  # a checkpoint may have more shards than a process may open
        run.append(record)
    flush()
    return found
