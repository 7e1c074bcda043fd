"""How a server's ranks load: together or alone, what is told, and failures, over gloo without a server."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from nvfp4_prep.errors import LoadError, ServingError
from nvfp4_prep.load import Catalog, ExpertLoader, GroupLoader, LoadOptions, options
from nvfp4_prep.load.options import default_threads, rank_threads
from nvfp4_prep.serving import cooperation
from nvfp4_prep.serving.cooperation import Alone, Cooperation, ServerRanks, server_ranks
from nvfp4_prep_kernels import MoeDims, PreparedTensor, rank_slice, take_rank
from support.cases import slow_after
from support.load_files import Written, write_checkpoint
from support.load_ranks import Outcome, run_ranks

CPU = torch.device("cpu")
DIMS = MoeDims(experts=5, intermediate=512, hidden=512)
LAYERS = (1, 2)
OPTIONS = LoadOptions(threads=1, chunk_nbytes=1 << 20)
PATIENCE_S = 1
"""The other ranks' ``wait_s`` where one hangs."""


@dataclass(frozen=True)
class Loading:
    """What a server's load does: parameters one by one, in this rank's own order, then the end.

    Returns what was told, which kind of loader it was, and the number of tensors equal to the file's.
    """

    written: Written
    mode: str = ""

    def __call__(self, rank: int, size: int, group: dist.ProcessGroup) -> tuple[list[str], str, int]:
        last, told = rank == size - 1, list[str]()
        if self.mode == "other host" and last:
            cooperation._BOOT_ID = self.written.root / "boot_id"
            cooperation._BOOT_ID.write_text("another")

        def make() -> ExpertLoader:
            if self.mode == "no loader" and last:
                raise LoadError("staging memory refused")
            return ExpertLoader("cpu", OPTIONS)

        def tell(text: str, *values: object) -> None:
            told.append(text % values)

        if self.mode == "dies" and last:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == "hangs" and last:
            time.sleep(PATIENCE_S + 15)
        wait_s = PATIENCE_S if self.mode == "hangs" else Cooperation.wait_s
        together = Cooperation(wanted=self.mode != "off", exchange_nbytes=1 << 20, wait_s=wait_s)
        with together.loading(lambda: ServerRanks(group, group), CPU, make, tell) as loader:
            kind, parameters = type(loader).__name__, self._submit(loader, rank, size)
            if self.mode == "fails" and last:
                raise LoadError("a file of something else is missing")
            loader.finish()
        if self.mode == "fails after" and last:
            raise LoadError("what the server does afterwards")
        return told, kind, self._equal(parameters, rank, size)

    def _share(self, rank: int, size: int) -> tuple[int, int]:
        return (rank, size * 2) if self.mode == "more ranks" else (rank, size)

    def _submit(self, loader: ExpertLoader | GroupLoader, rank: int, size: int) -> dict[tuple[int, str], torch.Tensor]:
        catalog, written = Catalog.open(self.written.root), self.written
        parameters = {}
        for number in LAYERS if rank % 2 else reversed(LAYERS):
            records = catalog.records(catalog.layer(number))
            for tensor in PreparedTensor if rank % 2 else reversed(PreparedTensor):
                part = rank_slice(written.layout, tensor, DIMS, *self._share(rank, size))
                target = torch.full((DIMS.experts, *part.shape), 0x3B, dtype=torch.uint8)
                loader.submit(written.file(number), records[tensor.value], part, range(DIMS.experts), target)
                parameters[number, tensor.value] = target
        return parameters

    def _equal(self, parameters: dict[tuple[int, str], torch.Tensor], rank: int, size: int) -> int:
        equal = 0
        for (number, name), loaded in parameters.items():
            with safe_open(self.written.file(number), "pt") as stream:
                found = next(each for each in stream.keys() if each.endswith(f".{name}"))  # noqa: SIM118
                stored = stream.get_tensor(found).view(torch.uint8)
            share = self._share(rank, size)
            equal += torch.equal(loaded, take_rank(self.written.layout, PreparedTensor(name), stored, DIMS, *share))
        return equal


TOGETHER = "The 2 tensor-parallel ranks of this host load prepared experts together."


@pytest.mark.parametrize(
    ("mode", "told", "kind"),
    slow_after(
        1,
        [
            ("", TOGETHER, "GroupLoader"),
            ("off", 'Each rank loads its prepared experts by itself: "cooperative" is false.', "ExpertLoader"),
            (
                "other host",
                "Each rank loads its prepared experts by itself: the tensor-parallel ranks are on several hosts.",
                "ExpertLoader",
            ),
        ],
    ),
)
def test_the_path_is_told_and_the_bytes_are_right(tmp_path: Path, mode: str, told: str, kind: str) -> None:
    outcomes, _ = run_ranks(Loading(write_checkpoint(tmp_path, DIMS, layers=LAYERS), mode), 2, tmp_path)
    assert outcomes == [Outcome(([told], kind, 8))] * 2


def test_ranks_of_a_larger_division_read_their_own(tmp_path: Path) -> None:
    """Data-parallel groups divide experts too, and the server's group knows half of the ranks."""
    outcomes, _ = run_ranks(Loading(write_checkpoint(tmp_path, DIMS, layers=LAYERS), "more ranks"), 2, tmp_path)
    told = [TOGETHER, "Nothing was exchanged: the experts are not divided between these 2 ranks alone."]
    assert outcomes == [Outcome((told, "GroupLoader", 8))] * 2


@pytest.mark.parametrize(
    ("mode", "what"), [("no loader", "staging memory refused"), ("fails", "a file of something else is missing")]
)
def test_a_failure_before_the_exchange_is_every_rank_s(tmp_path: Path, mode: str, what: str) -> None:
    outcomes, seconds = run_ranks(Loading(write_checkpoint(tmp_path, DIMS, layers=LAYERS), mode), 2, tmp_path)
    for outcome in outcomes:
        assert outcome is not None and outcome.error == "LoadError"
        assert outcome.text.startswith("rank 1 of 2 failed: ") and what in outcome.text
    assert seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dies", "hangs"])
def test_a_rank_that_does_not_come(tmp_path: Path, mode: str) -> None:
    """A process that ends is noticed by its connections, long before half an hour; one that hangs after ``wait_s``."""
    outcomes, seconds = run_ranks(Loading(write_checkpoint(tmp_path, DIMS, layers=LAYERS), mode), 3, tmp_path)
    for rank, outcome in enumerate(outcomes[:2]):
        assert outcome is not None and outcome.error == "LoadError"
        assert outcome.text.startswith("rank 2 of 3, which does not answer, did not take part in loading")
        assert f"(seen by rank {rank})" in outcome.text
    assert seconds < 120  # not the half hour of the default


def test_a_failure_after_the_end_is_the_rank_s_own(tmp_path: Path) -> None:
    outcomes, seconds = run_ranks(Loading(write_checkpoint(tmp_path, DIMS, layers=LAYERS), "fails after"), 2, tmp_path)
    assert outcomes[0] == Outcome(([TOGETHER], "GroupLoader", 8))
    assert outcomes[1] is not None and outcomes[1].text == "what the server does afterwards"
    assert seconds < 10


def test_a_server_without_groups() -> None:
    found = server_ranks(SimpleNamespace(world_size=2), "vLLM")
    assert found == Alone("this version of vLLM names no process groups of its tensor-parallel ranks")
    assert server_ranks(None, "SGLang") == replace(found, reason=found.reason.replace("vLLM", "SGLang"))


@pytest.mark.parametrize(
    "extra",
    [
        {"cooperative": "no"},
        {"exchange_nbytes": True},
        {"exchange_nbytes": 0},
        {"wait_s": 0},
        {"wait_s": True},
        {"wait_s": "60"},
        {"wait_s": float("nan")},
        {"wait_s": 1e9},
    ],
    ids=str,
)
def test_unusable_options(extra: dict[str, object]) -> None:
    with pytest.raises(ServingError, match=f"unusable option {next(iter(extra))}"):
        Cooperation.take(extra)


def test_options_are_taken_out_of_the_servers() -> None:
    extra = {"cooperative": False, "exchange_nbytes": 5, "wait_s": 2.5, "threads": 3}
    assert Cooperation.take(extra) == Cooperation(False, 5, 2.5)
    assert extra == {"threads": 3}
    assert Cooperation.take({}) == Cooperation(True, 256 << 20, 1800)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(32, 8, 3), (32, 2, 12), (16, 1, 12), (2, 8, 1), (2, 2, 1)])
def test_threads_of_a_rank(cores: int, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: cores)
    assert rank_threads(ranks) == threads
    assert rank_threads(1) == default_threads(cores)
