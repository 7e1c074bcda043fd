"""A reading thread's staging, without threads and without a GPU."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch

from nvfp4_prep.errors import LoadError
from nvfp4_prep.load import Catalog, ExpertLoader, Gather, LoadOptions, RankShare, load_layer, load_layers, reader
from nvfp4_prep.load.read_plan import Segment, Task, pieces, plan_reads
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

    def _staged(self, source: int, nbytes: int) -> torch.Tensor:
        begin = source - self._slab.data_ptr()
        assert begin >= 0 and begin + nbytes <= len(self._slab)
        return self._slab[begin : begin + nbytes]

    def copy(self, source: int, target: int, nbytes: int, ready: torch.cuda.Event | None) -> None:
        assert ready is None
        ctypes.memmove(target, self._staged(source, nbytes).data_ptr(), nbytes)
        self._slab.fill_(0xA5)

    def copy_runs(self, source: int, cut: Segment, target: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        assert ready is None
        staged = self._staged(source, cut.span_nbytes)
        rows, out = run_views(staged, 0, cut.run_nbytes, cut.stride_bytes, cut.runs, target)
        out.copy_(rows)
        self._slab.fill_(0xA5)


def targets_of(task: Task, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    places = ((chunk.destination_bytes, chunk.destination_bytes + chunk.nbytes) for chunk in task.chunks)
    return tuple(parameter[begin:end] for begin, end in places)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("options", [None, BATCHED], ids=["standard", "batched"])
@pytest.mark.parametrize("experts", [[0, 1, 2], [1], [0, 2]])
@pytest.mark.parametrize("tp", [(0, 1), (1, 2)])
def test_what_goes_to_a_gpu_is_filled_to_the_last_byte(
    tmp_path: Path, options: ConvertOptions | None, experts: list[int], tp: tuple[int, int], divided: bool
) -> None:
    """Without a GPU: each staging buffer has all bytes of its chunk, or of its piece of a long range."""
    written = write_checkpoint(tmp_path, MoeDims(3, 256, 256), options=options)
    slab = torch.zeros(SMALL.staging_nbytes, dtype=torch.uint8)
    staging = Buffers(slab, SMALL.buffer_nbytes, SMALL.chunk_nbytes, threads=1)
    copies, arrived = HostCopies(slab), list[int]()
    reading = Reading(
        0, staging, SMALL.buffer_nbytes, copies, lambda job, nbytes: arrived.append(nbytes), lambda: False
    )
    records = Catalog.open(tmp_path).records(written.manifest.layers[0])
    for tensor in PreparedTensor:
        record, part = records[tensor.value], rank_slice(written.layout, tensor, written.dims, *tp)
        found = torch.zeros(len(experts) * part.nbytes, dtype=torch.uint8)
        source = reader.FileReader.open(tmp_path / record.file)
        path, limit = tmp_path / record.file, SMALL.chunk_nbytes
        for task in plan_reads(path, record, part, experts, limit, divided=divided):
            begins = pieces(task.chunks[0].segments[0], limit) if task.chunks[0].long else None
            job = Job(task, source, targets_of(task, found), None, Submission(task.units), begins and iter(begins))
            reading.run(job)
            assert sum(arrived) == task.nbytes and reading.left == 0
            assert len(arrived) == len(task.chunks if begins is None else begins)
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


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_threads_divide_a_long_range_among_themselves(tmp_path: Path, threads: int) -> None:
    written = write_checkpoint(tmp_path, MoeDims(3, 256, 256))
    options = LoadOptions(threads=threads, chunk_nbytes=65536)
    loaded = load_layer(tmp_path, 1, options=options)
    for tensor in PreparedTensor:
        stored = written.tensors[1][tensor.value].view(torch.uint8)
        assert torch.equal(loaded.tensors[tensor.value].view(torch.uint8).flatten(), stored.flatten())


def test_of_a_failed_load_every_piece_is_dropped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise finish() would wait for ever, or return while a thread still writes."""
    write_checkpoint(tmp_path, MoeDims(3, 256, 256))
    read, calls = reader.FileReader.read, itertools.count()

    def fails(self: reader.FileReader, tensor: str, *rest: object) -> None:
        if next(calls) == 2:
            raise LoadError("the disk is gone", where=tensor)
        read(self, tensor, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reader.FileReader, "read", fails)
    catalog = Catalog.open(tmp_path)
    with ExpertLoader("cpu", LoadOptions(threads=4, chunk_nbytes=65536)) as loader:
        with pytest.raises(LoadError, match="the disk is gone"):
            load_layers(catalog, [catalog.layer(1)], RankShare(), loader)
        layers, _ = load_layers(catalog, [catalog.layer(1)], RankShare(), loader)
    assert next(calls) > 3
    assert all(tensor.view(torch.uint8).any() for tensor in layers[0].tensors.values())
