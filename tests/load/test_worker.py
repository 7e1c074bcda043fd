"""What a reading thread fills, without threads and without a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_prep.load import Catalog, LoadOptions, reader
from nvfp4_prep.load.read_plan import plan_reads
from nvfp4_prep.load.strided_copy import run_views
from nvfp4_prep.load.worker import Buffers, Filled, Job, Reading, Submission
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep_kernels import MoeDims, PreparedTensor, rank_slice, take_rank
from support.load_files import BATCHED, write_checkpoint

SMALL = LoadOptions(threads=1, chunk_nbytes=65536)


@pytest.mark.parametrize("options", [None, BATCHED], ids=["standard", "batched"])
@pytest.mark.parametrize("experts", [[0, 1, 2], [1], [0, 2]])
@pytest.mark.parametrize("tp", [(0, 1), (1, 2)])
def test_what_goes_to_a_gpu_is_filled_to_the_last_byte(
    tmp_path: Path, options: ConvertOptions | None, experts: list[int], tp: tuple[int, int]
) -> None:
    """The short way for one range of the file, without a card: each staging buffer has all bytes of its chunk."""
    written = write_checkpoint(tmp_path, MoeDims(3, 256, 256), options=options)
    filled = list[Filled]()
    staging = Buffers(torch.zeros(SMALL.staging_nbytes, dtype=torch.uint8), SMALL.buffer_nbytes, SMALL.chunk_nbytes)
    reading = Reading(staging, SMALL.buffer_nbytes, filled.append, lambda job, nbytes: None)
    records = Catalog.open(tmp_path).records(written.manifest.layers[0])
    for tensor in PreparedTensor:
        record, part = records[tensor.value], rank_slice(written.layout, tensor, written.dims, *tp)
        found = bytearray(len(experts) * part.nbytes)
        source = reader.FileReader(tmp_path / record.file)
        for task in plan_reads(tmp_path / record.file, record, part, experts, SMALL.chunk_nbytes):
            reading.run(Job(task, source, (None,) * len(task.chunks), None, Submission(task.units)))
            for chunk, item in zip(task.chunks, filled, strict=True):
                data = staging.bytes[item.buffer][item.lead : item.lead + item.nbytes]
                if item.cut is not None:
                    data = torch.empty_like(data)
                    cut = item.cut
                    rows, out = run_views(
                        staging.bytes[item.buffer], item.lead, cut.run_nbytes, cut.stride_bytes, cut.runs, data
                    )
                    out.copy_(rows)
                assert len(data) == chunk.nbytes
                found[chunk.destination_bytes : chunk.destination_bytes + chunk.nbytes] = bytes(data.tolist())
                staging.free.put(item.buffer)
            filled.clear()
        source.close()
        stored = written.tensors[1][tensor.value].view(torch.uint8)[experts]
        assert bytes(found) == bytes(take_rank(written.layout, tensor, stored, written.dims, *tp).flatten().tolist())
