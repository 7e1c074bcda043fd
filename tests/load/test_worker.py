"""A reading thread's staging, without threads and without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_prep.load import Catalog, Gather, LoadOptions, load_layer, reader
from nvfp4_prep.load.read_plan import Segment, plan_reads
from nvfp4_prep.load.strided_copy import run_views
from nvfp4_prep.load.worker import Buffers, Job, Reading, Submission
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep_kernels import MoeDims, PreparedTensor, rank_slice, take_rank
from support.load_files import BATCHED, write_checkpoint

SMALL = LoadOptions(threads=1, chunk_nbytes=65536)


class HostCopies:
    """Copies to host memory in the place of those to a GPU; what was staged is spoilt afterwards, as by a next read."""

    def __init__(self, slab: torch.Tensor) -> None:
        self._slab = slab

    def copy(self, staged: torch.Tensor, target: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        assert len(staged) == len(target) and ready is None
        target.copy_(staged)
        self._slab.fill_(0xA5)

    def copy_runs(
        self, staged: torch.Tensor, cut: Segment, target: torch.Tensor, ready: torch.cuda.Event | None
    ) -> None:
        assert len(staged) == cut.span_nbytes and ready is None
        rows, out = run_views(staged, 0, cut.run_nbytes, cut.stride_bytes, cut.runs, target)
        out.copy_(rows)
        self._slab.fill_(0xA5)


@pytest.mark.parametrize("options", [None, BATCHED], ids=["standard", "batched"])
@pytest.mark.parametrize("experts", [[0, 1, 2], [1], [0, 2]])
@pytest.mark.parametrize("tp", [(0, 1), (1, 2)])
def test_what_goes_to_a_gpu_is_filled_to_the_last_byte(
    tmp_path: Path, options: ConvertOptions | None, experts: list[int], tp: tuple[int, int]
) -> None:
    """The short way for one range of the file, without a GPU: each staging buffer has all bytes of its chunk."""
    written = write_checkpoint(tmp_path, MoeDims(3, 256, 256), options=options)
    slab = torch.zeros(SMALL.staging_nbytes, dtype=torch.uint8)
    staging = Buffers(slab, SMALL.buffer_nbytes, SMALL.chunk_nbytes, threads=1)
    copies, arrived = HostCopies(slab), list[int]()
    reading = Reading(0, staging, SMALL.buffer_nbytes, copies, lambda job, nbytes: arrived.append(nbytes))
    records = Catalog.open(tmp_path).records(written.manifest.layers[0])
    for tensor in PreparedTensor:
        record, part = records[tensor.value], rank_slice(written.layout, tensor, written.dims, *tp)
        found = torch.zeros(len(experts) * part.nbytes, dtype=torch.uint8)
        source = reader.FileReader(tmp_path / record.file)
        for task in plan_reads(tmp_path / record.file, record, part, experts, SMALL.chunk_nbytes):
            targets = tuple(
                found[chunk.destination_bytes : chunk.destination_bytes + chunk.nbytes] for chunk in task.chunks
            )
            reading.run(Job(task, source, targets, None, Submission(task.units)))
            assert arrived == [chunk.nbytes for chunk in task.chunks]
            arrived.clear()
        source.close()
        stored = written.tensors[1][tensor.value].view(torch.uint8)[experts]
        assert bytes(found.tolist()) == bytes(
            take_rank(written.layout, tensor, stored, written.dims, *tp).flatten().tolist()
        )


@pytest.mark.parametrize(
    ("buffers", "threads", "owned"),
    [(4, 2, [{0, 2}, {1, 3}]), (5, 2, [{0, 2, 4}, {1, 3}]), (2, 3, [{0}, {1}, {0}]), (1, 2, [{0}, {0}])],
)
def test_a_thread_gets_its_own_buffers_only(buffers: int, threads: int, owned: list[set[int]]) -> None:
    staging = Buffers(torch.zeros(buffers * 16, dtype=torch.uint8), 16, 16, threads)
    for thread, numbers in enumerate(owned):
        for _ in range(3):
            taken = {staging.take(thread) for _ in numbers}
            assert taken == numbers
            for number in taken:
                staging.give_back(number)


@pytest.mark.parametrize("buffers", [1, 3, 0], ids=["one", "fewer than threads", "default"])
def test_a_load_ends_with_any_number_of_buffers(tmp_path: Path, buffers: int) -> None:
    written = write_checkpoint(tmp_path, MoeDims(3, 256, 256))
    options = LoadOptions(threads=4, buffers=buffers, chunk_nbytes=65536, gather=Gather.ROWS)
    loaded = load_layer(tmp_path, 1, tp=(1, 2), options=options)
    for tensor in PreparedTensor:
        stored = written.tensors[1][tensor.value].view(torch.uint8)
        expected = take_rank(written.layout, tensor, stored, written.dims, 1, 2)
        assert torch.equal(loaded.tensors[tensor.value].view(torch.uint8).flatten(), expected.flatten())
