"""Ranks that load together over NCCL, one a GPU: bit equality, a full device, a failing and a killed rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from nvfp4_prep.load import (
    Catalog,
    CooperativeGroup,
    ExpertLoader,
    LoadOptions,
    RankShare,
    TakesParameters,
    cooperative,
    load_layer,
)
from nvfp4_prep.load.api import LayerLoad
from nvfp4_prep.serving.cooperation import Cooperation, ServerRanks
from nvfp4_prep_kernels import MoeDims, PreparedTensor, take_rank
from support.load_files import Written, write_checkpoint
from support.load_ranks import Outcome, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

MIB = 1 << 20
DIMS = MoeDims(experts=7, intermediate=1024, hidden=2048)
OPTIONS = LoadOptions(threads=2, chunk_nbytes=MIB)


@dataclass(frozen=True)
class OverNccl:
    """Loads over NCCL on this rank's GPU; ``work`` gets the rank, the group and one on the CPU."""

    written: Written
    work: Callable[[Written, int, dist.ProcessGroup, dist.ProcessGroup], Any]
    timeout: timedelta = timedelta(seconds=60)

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> Any:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        torch.cuda.set_device(rank)
        over_nccl = dist.new_group(backend="nccl", timeout=self.timeout)
        dist.all_reduce(torch.zeros(1, device="cuda"), group=over_nccl)
        return self.work(self.written, rank, over_nccl, group)


def equal_tensors(written: Written, tensors: dict[str, torch.Tensor], rank: int) -> int:
    equal = 0
    with safe_open(written.file(1), "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            tensor = PreparedTensor(name.rsplit(".", 1)[1])
            stored = stream.get_tensor(name).view(torch.uint8)
            expected = take_rank(written.layout, tensor, stored, DIMS, rank, 2)
            equal += torch.equal(tensors[tensor.value].view(torch.uint8).cpu(), expected)
    return equal


def load(written: Written, rank: int, group: dist.ProcessGroup, _cpu: dist.ProcessGroup) -> int:
    together = CooperativeGroup(group, 8 * MIB, timeout=timedelta(seconds=20))
    options = OPTIONS if rank else LoadOptions(threads=3)
    loaded = load_layer(written.root, 1, tp=(rank, 2), device=f"cuda:{rank}", options=options, group=together)
    return equal_tensors(written, dict(loaded.tensors), rank)


def load_as_a_server(written: Written, rank: int, group: dist.ProcessGroup, cpu: dist.ProcessGroup) -> int:
    device, told = torch.device("cuda", rank), list[str]()

    def make() -> ExpertLoader:
        return ExpertLoader(device, OPTIONS)

    def submit(loader: TakesParameters) -> dict[str, torch.Tensor]:
        catalog = Catalog.open(written.root)
        with ExpertLoader(device, OPTIONS) as own:
            layer = LayerLoad(catalog, catalog.layer(1), RankShare(tp_rank=rank, tp_size=2), own)
        for tensor in PreparedTensor:
            item = layer.parameter(tensor)
            loader.submit(item.path, item.record, item.part, item.experts, item.parameter)
        return dict(layer.loaded.tensors)

    cooperation = Cooperation(exchange_nbytes=8 * MIB)
    with cooperation.loading(
        lambda: ServerRanks(group, cpu), device, make, lambda *words: told.append(words[0])
    ) as way:
        tensors = submit(way)
        way.finish()
    assert "together" in told[0]
    torch.cuda.synchronize()
    return equal_tensors(written, tensors, rank)


@pytest.mark.parametrize("work", [load, load_as_a_server])
def test_every_tensor_equals_the_file(tmp_path: Path, work: Callable[..., Any]) -> None:
    written = write_checkpoint(tmp_path, DIMS)
    outcomes, _ = run_ranks(OverNccl(written, work), 2, tmp_path, timeout=timedelta(seconds=60))
    assert outcomes == [Outcome(4)] * 2


def load_on_a_full_gpu(written: Written, rank: int, group: dist.ProcessGroup, cpu: dist.ProcessGroup) -> int:
    if rank == 1:  # room for the parameters, not for the exchange
        room = 3 * written.file(1).stat().st_size // 4
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(rank).total_memory)
    return load(written, rank, group, cpu)


def load_with_a_damaged_read(written: Written, rank: int, group: dist.ProcessGroup, cpu: dist.ProcessGroup) -> int:
    if rank == 1:
        exchange = cooperative.CooperativeLoad._exchange

        def shortened(self: cooperative.CooperativeLoad, number: int) -> None:
            if number == 0:
                os.truncate(written.file(1), 4096)
            exchange(self, number)

        cooperative.CooperativeLoad._exchange = shortened  # type: ignore[method-assign]
    return load(written, rank, group, cpu)


@pytest.mark.parametrize(
    ("work", "words"),
    [(load_on_a_full_gpu, "no memory for"), (load_with_a_damaged_read, "file ended")],
    ids=["full GPU", "shortened file"],
)
def test_a_failure_of_one_rank_is_every_rank_s(tmp_path: Path, work: Callable[..., Any], words: str) -> None:
    written = write_checkpoint(tmp_path, DIMS)
    outcomes, seconds = run_ranks(OverNccl(written, work), 2, tmp_path, timeout=timedelta(seconds=60))
    for outcome in outcomes:
        assert outcome is not None and outcome.error == "LoadError" and words in outcome.text, outcomes
    assert seconds < 60


def load_until_killed(written: Written, rank: int, group: dist.ProcessGroup, cpu: dist.ProcessGroup) -> int:
    if rank == 1:
        cooperative.CooperativeLoad._exchange = lambda *_: os.kill(os.getpid(), 9)  # type: ignore[method-assign]
    together = CooperativeGroup(group, 8 * MIB, timeout=timedelta(seconds=5))
    load_layer(written.root, 1, tp=(rank, 2), device=f"cuda:{rank}", options=OPTIONS, group=together)
    return 0


def test_a_killed_rank_ends_the_other_one(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, DIMS)
    within = timedelta(seconds=20)
    outcomes, seconds = run_ranks(OverNccl(written, load_until_killed, within), 2, tmp_path, timeout=within)
    survivor, killed = outcomes
    assert killed is None and seconds < 120  # the timeout, and the start and end of two processes with a GPU each
    if survivor is not None:  # else NCCL's watchdog saw it first and ended the process, as it does in a server
        assert survivor.error == "LoadError"
        assert "rank 1 of 2" in survivor.text and "did not take part" in survivor.text
