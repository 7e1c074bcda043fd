"""Ranks that load together over gloo: bit equality with the file, reads, failures of one rank."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from nvfp4_prep.errors import UsageError
from nvfp4_prep.load import (
    Catalog,
    CooperativeGroup,
    ExpertLoader,
    LoadOptions,
    RankShare,
    cooperative,
    load_layer,
    load_layers,
    reader,
    shared_parameter,
)
from nvfp4_prep.load import options as load_options
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, take_rank
from support.cases import slow_after
from support.load_files import BATCHED, Written, write_checkpoint
from support.load_ranks import Outcome, run_ranks

MIB = 1 << 20
DIMS = MoeDims(experts=7, intermediate=512, hidden=512)
LARGE = MoeDims(experts=9, intermediate=1024, hidden=4096)
"""Experts of w2 have 2 MiB, scales 0.25 MiB: reads as long as a real model's."""
OPTIONS = LoadOptions(threads=2, chunk_nbytes=MIB)
MAPS: tuple[tuple[int, ...] | None, ...] = (None, (4, 0, 0, 6, 3), (5,), (6, 5, 4, 3, 2, 1, 0, 1))


def from_file(path: Path, layout: MoeLayout, dims: MoeDims, experts: Sequence[int], tp: tuple[int, int]) -> Any:
    """A rank's big tensors as the safetensors library reads the file and the layout package slices it."""
    found = {}
    with safe_open(path, "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            tensor = PreparedTensor(name.rsplit(".", 1)[1])
            stored = stream.get_tensor(name).view(torch.uint8)[list(experts)]
            found[tensor.value] = take_rank(layout, tensor, stored, dims, *tp)
    return found


@dataclass(frozen=True)
class Equal:
    """Loads several maps of experts and compares; returns how many tensors were equal."""

    root: Path
    layout: MoeLayout
    dims: MoeDims
    maps: tuple[tuple[int, ...] | None, ...]
    exchange_nbytes: int
    network: bool = False

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> int:
        compared = 0
        shared_parameter.is_network_storage = lambda _device: self.network
        together = CooperativeGroup(group, self.exchange_nbytes)
        for number, experts in enumerate(self.maps):
            options = replace(OPTIONS, verify=number % 2 == 1)
            loaded = load_layer(self.root, 1, tp=(rank, size), experts=experts, options=options, group=together)
            slots = experts or tuple(range(self.dims.experts))
            file = self.root / "experts-layer-00001.safetensors"
            for name, expected in from_file(file, self.layout, self.dims, slots, (rank, size)).items():
                assert torch.equal(loaded.tensors[name].view(torch.uint8), expected), (name, experts)
                compared += 1
            with safe_open(self.root / "expert-scales.safetensors", "pt") as stream:
                for name in stream.keys():  # noqa: SIM118
                    vector = stream.get_tensor(name)[list(slots)]
                    assert torch.equal(loaded.tensors[name.rsplit(".", 1)[1]], vector)
        return compared


@pytest.mark.parametrize("network", slow_after(1, [False, True]), ids=["local", "network"])
@pytest.mark.parametrize(
    ("size", "layout"), slow_after(1, [(2, "standard"), (2, "batched"), (2, "not gated"), (4, "standard")])
)
def test_every_tensor_equals_the_file(tmp_path: Path, size: int, layout: str, network: bool) -> None:
    options = BATCHED if layout == "batched" else None
    written = write_checkpoint(tmp_path, DIMS, gated=layout != "not gated", options=options)
    work = Equal(tmp_path, written.layout, DIMS, MAPS, MIB, network)
    outcomes, _ = run_ranks(work, size, tmp_path)
    assert outcomes == [Outcome(4 * len(MAPS))] * size


@dataclass(frozen=True)
class Counted:
    """Loads two layers and returns the bytes that were read, and the sizes of this rank's reads of a tensor."""

    root: Path
    tensor: str = "w2_weight"
    network: bool = False

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> tuple[int, list[int]]:
        reads: list[int] = []
        preadv = os.preadv

        def counted(descriptor: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
            count = preadv(descriptor, buffers, offset, *flags)
            vector = count == 4 * LARGE.experts  # of another file
            if not (flags or vector) and any(begin <= offset < end for begin, end in places):
                reads.append(count)
            return count

        catalog = Catalog.open(self.root)
        shared_parameter.is_network_storage = lambda _device: self.network
        records = [catalog.records(layer)[self.tensor] for layer in catalog.manifest.layers]
        places = [(record.offset_bytes, record.offset_bytes + record.nbytes) for record in records]
        reader.os.preadv = counted  # type: ignore[attr-defined]
        with ExpertLoader("cpu", replace(OPTIONS, direct_io="never")) as loader:  # type: ignore[arg-type]
            share = RankShare(tp_rank=rank, tp_size=size)
            _, report = load_layers(catalog, catalog.manifest.layers, share, loader, group)
        return report.counts.nbytes, reads


@pytest.mark.slow
def test_the_ranks_read_the_file_once_in_long_ranges(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, LARGE, layers=(1, 2))
    outcomes, _ = run_ranks(Counted(tmp_path), 2, tmp_path)
    assert all(outcome is not None and not outcome.error for outcome in outcomes), outcomes
    values = [outcome.value for outcome in outcomes if outcome is not None]
    whole = sum(written.file(layer).stat().st_size for layer in (1, 2))
    assert 0.99 * whole < sum(nbytes for nbytes, _ in values) <= 1.01 * whole
    for _, reads in values:
        short = [count for count in reads if count < MIB - 4096]  # chunks end at pages of the file
        # A tail for each round of each layer, 4 or 5 experts of this rank
        assert len(reads) >= 2 * 8 and len(short) <= 2
    assert sum(sum(reads) for _, reads in values) == 2 * LARGE.experts * LARGE.hidden * LARGE.intermediate // 2


@pytest.mark.slow
@pytest.mark.parametrize("network", [False, True], ids=["local", "network"])
def test_short_rows_of_w13_on_network_storage(tmp_path: Path, network: bool) -> None:
    """Scales of w13 have 0.5 MiB an expert: each rank reads its half of each, or whole experts one after the other."""
    written = write_checkpoint(tmp_path, LARGE, layers=(1, 2))
    outcomes, _ = run_ranks(Counted(tmp_path, "w13_weight_scale", network), 2, tmp_path)
    values = [outcome.value for outcome in outcomes if outcome is not None]
    whole = sum(written.file(layer).stat().st_size for layer in (1, 2))
    assert 0.99 * whole < sum(nbytes for nbytes, _ in values) <= 1.01 * whole
    stored = LARGE.intermediate * 2 * LARGE.hidden // 16
    assert sum(sum(reads) for _, reads in values) == 2 * LARGE.experts * stored
    count = sum(len(reads) for _, reads in values)
    assert count == 2 * 2 * LARGE.experts if not network else count < LARGE.experts * 2


@dataclass(frozen=True)
class Failing:
    """Loads from a directory of its own on the last rank; the others from the good one."""

    good: Path
    bad: Path
    verify: bool = False

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        root = self.bad if rank == size - 1 else self.good
        load_layer(root, 1, tp=(rank, size), options=replace(OPTIONS, verify=self.verify), group=group)


def copy_of(written: Written, root: Path) -> Path:
    root.mkdir()
    for path in written.root.iterdir():
        if path.is_file():
            (root / path.name).write_bytes(path.read_bytes())
    return root / written.file(1).name


def assert_all_name(outcomes: list[Outcome | None], *words: str) -> None:
    for outcome in outcomes:
        assert outcome is not None and outcome.error == "LoadError", outcomes
        for word in words:
            assert word in outcome.text


@pytest.mark.parametrize(("folder", "named"), [(b"bad", "bad"), (b"bad-\xff", "bad-\\udcff")])
def test_a_truncated_file_of_one_rank_fails_all(tmp_path: Path, folder: bytes, named: str) -> None:
    (tmp_path / "good").mkdir()
    written = write_checkpoint(tmp_path / "good", DIMS)
    file = copy_of(written, tmp_path / os.fsdecode(folder))
    os.truncate(file, file.stat().st_size - 1)
    outcomes, seconds = run_ranks(Failing(written.root, file.parent), 2, tmp_path)
    assert_all_name(outcomes, "rank 1 of 2", f"{tmp_path / named}/{file.name}", "file size does not match")
    assert seconds < 10


@dataclass(frozen=True)
class Shortened:
    """As :class:`Failing`, but the file becomes shorter after it was opened: in the third round of reads."""

    good: Path
    bad: Path
    rounds_a_question: int

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        root, reading = (self.bad, cooperative.CooperativeLoad._read) if rank == 1 else (self.good, None)

        def read(load: cooperative.CooperativeLoad, number: int) -> None:
            if number == 2:
                os.truncate(root / "experts-layer-00001.safetensors", 4096)
            assert reading is not None
            reading(load, number)

        exchange = cooperative.CooperativeLoad._exchange

        def counted(load: cooperative.CooperativeLoad, number: int) -> None:
            (self.good.parent / f"rounds-{rank}").write_text(f"{number + 1} of {len(load._rounds)}")
            exchange(load, number)

        cooperative.CooperativeLoad._exchange = counted  # type: ignore[method-assign]
        cooperative._ROUNDS_A_QUESTION = self.rounds_a_question
        if reading is not None:
            cooperative.CooperativeLoad._read = read  # type: ignore[method-assign]
        together = CooperativeGroup(group, MIB // 2)
        load_layer(root, 1, tp=(rank, size), options=replace(OPTIONS, chunk_nbytes=65536), group=together)


@pytest.mark.parametrize(("rounds_a_question", "last"), [(1, (2, 3, 4)), (8, (5,))])
def test_a_file_that_becomes_shorter_in_a_later_round_fails_all(
    rounds_a_question: int, last: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "good").mkdir()
    written = write_checkpoint(tmp_path / "good", DIMS)
    file = copy_of(written, tmp_path / "bad")
    outcomes, seconds = run_ranks(Shortened(written.root, file.parent, rounds_a_question), 2, tmp_path)
    assert_all_name(outcomes, "rank 1 of 2", str(file), "file ended while it was read")
    assert seconds < 10
    rounds = {(tmp_path / f"rounds-{rank}").read_text() for rank in range(2)}
    assert rounds < {f"{number} of 5" for number in (*last, 0)} and len(rounds) == 1


def test_a_damaged_expert_is_found_by_the_rank_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    written = write_checkpoint(tmp_path / "good", DIMS)
    file = copy_of(written, tmp_path / "bad")
    record = Catalog.open(file.parent).records(written.manifest.layers[0])["w2_weight"]
    with file.open("r+b") as stream:
        stream.seek(record.offset_bytes + record.nbytes - 1)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([last ^ 1]))
    outcomes, _ = run_ranks(Failing(written.root, file.parent, verify=True), 2, tmp_path)
    assert_all_name(outcomes, "rank 1 of 2", str(file), "expert 6 does not have the bytes that were converted")


@dataclass(frozen=True)
class Killed:
    """The last rank ends without a word before its second exchange, or hangs."""

    root: Path
    hang: bool

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        exchange = cooperative.CooperativeLoad._exchange

        def end(load: cooperative.CooperativeLoad, number: int) -> None:
            if number == 1 and not self.hang:
                os.kill(os.getpid(), 9)
            if number == 1:
                time.sleep(5)
                os._exit(0)
            exchange(load, number)

        if rank == size - 1:
            cooperative.CooperativeLoad._exchange = end  # type: ignore[method-assign]
        together = CooperativeGroup(group, MIB, timeout=timedelta(seconds=1))
        load_layer(self.root, 1, tp=(rank, size), options=OPTIONS, group=together)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "hang"), [(2, False), (2, True), (4, False)])
def test_a_killed_or_hanging_rank_ends_the_others_and_is_named(tmp_path: Path, size: int, hang: bool) -> None:
    write_checkpoint(tmp_path, DIMS)
    outcomes, seconds = run_ranks(Killed(tmp_path, hang), size, tmp_path)
    assert outcomes[-1] is None
    assert_all_name(outcomes[:-1], f"rank {size - 1} of {size}", "did not take part in loading")
    assert seconds < 10


@dataclass(frozen=True)
class Different:
    """Ranks that do not ask for the same experts."""

    root: Path

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        load_layer(self.root, 1, tp=(rank, size), experts=[0, 1 + rank], options=OPTIONS, group=group)


def test_ranks_that_ask_for_different_experts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DIMS)
    outcomes, _ = run_ranks(Different(tmp_path), 2, tmp_path)
    for outcome in outcomes:
        assert outcome is not None and outcome.error == UsageError.__name__
        assert "do not load the same" in outcome.text and "rank 1" in outcome.text


@dataclass(frozen=True)
class WrongRank:
    """Tensor-parallel ranks that are not those of the group."""

    root: Path

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        load_layer(self.root, 1, tp=(0, 4), options=OPTIONS, group=group)


def test_a_group_of_other_ranks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DIMS)
    outcomes, _ = run_ranks(WrongRank(tmp_path), 2, tmp_path)
    assert_all_name(outcomes, "rank 0 of 2", "not the share of tensor-parallel rank 0 of 2")


def test_what_is_no_group(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DIMS)
    with pytest.raises(UsageError, match=r"argument group is wrong; expected .*ProcessGroup"):
        load_layer(tmp_path, 1, options=OPTIONS, group="tp")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Threads:
    """Returns with how many threads a rank reads, by itself and in a group, on ``cores``."""

    root: Path
    cores: int

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> list[int]:
        counts: list[int] = []
        made = ExpertLoader.__init__

        def counted(self: ExpertLoader, device: Any, options: LoadOptions | None = None, **kw: Any) -> None:
            counts.append((options or LoadOptions()).thread_count)
            made(self, device, options, **kw)

        load_options.usable_cores = lambda: self.cores
        ExpertLoader.__init__ = counted  # type: ignore[method-assign]
        for options in (None, LoadOptions(chunk_nbytes=MIB), LoadOptions(threads=5)):
            load_layer(self.root, 1, tp=(rank, size), options=options, group=group)
            load_layer(self.root, 1, tp=(rank, size), options=options, group=CooperativeGroup(group))
        load_layer(self.root, 1, tp=(rank, size))
        return counts


def test_the_ranks_of_a_group_share_the_cores(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DIMS)
    outcomes, _ = run_ranks(Threads(tmp_path, 8), 2, tmp_path)
    assert outcomes == [Outcome([3, 3, 3, 3, 5, 5, 6])] * 2


@dataclass(frozen=True)
class FullDevice:
    """The last rank is refused memory: for a parameter, or for the exchange."""

    root: Path
    of: str

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        if rank == size - 1:
            module = {"parameters": "nvfp4_prep.load.api", "exchange": "nvfp4_prep.load.cooperative"}[self.of]
            refusing = SimpleNamespace(**{**vars(torch), "empty": _refused})
            sys.modules[module].torch = refusing  # type: ignore[attr-defined]
        load_layer(self.root, 1, tp=(rank, size), options=OPTIONS, group=group)


def _refused(*_sizes: object, **_kind: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 MiB.")


@pytest.mark.parametrize(
    ("of", "words"), [("parameters", "tensor 'model.layers.1"), ("exchange", "no memory for the exchange")]
)
def test_a_full_device_of_one_rank_fails_all(tmp_path: Path, of: str, words: str) -> None:
    write_checkpoint(tmp_path, DIMS)
    outcomes, seconds = run_ranks(FullDevice(tmp_path, of), 2, tmp_path)
    assert_all_name(outcomes, "rank 1 of 2", "no memory for", "CUDA out of memory", words)
    assert seconds < 10
