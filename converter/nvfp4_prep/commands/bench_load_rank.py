"""One process of ``bench_load``: a rank that loads when it is told to."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.load import (
    Catalog,
    CooperativeGroup,
    ExpertLoader,
    GroupLoader,
    LoadOptions,
    LoadReport,
    RankShare,
    TakesParameters,
)
from nvfp4_prep.load.api import LayerLoad
from nvfp4_prep.load.ranks import Ranks
from nvfp4_prep.load.shared_parameter import SharedParameter
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["RankJob", "RankTurn", "run_rank"]

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class RankJob:
    """The share of one rank, and how it loads it.

    Attributes:
        path: the prepared checkpoint.
        layers: paths of the layers' experts.
        tp, ep: ``(rank, size)``.
        device: of the parameters.
        options: of the loader.
        together: whether the tensor-parallel ranks load as a group.
        store: file where the processes meet; does not exist yet.
    """

    path: Path
    layers: tuple[str, ...]
    tp: tuple[int, int]
    ep: tuple[int, int]
    device: str
    options: LoadOptions
    together: bool
    store: Path


@dataclass(frozen=True)
class RankTurn:
    """One load of one rank.

    Attributes:
        tp_rank, ep_rank, device: whose.
        begun, ended: on the system's monotonic clock.
        nbytes: of its parameters.
        read_nbytes, reads: out of files, and the requests; ``direct_nbytes`` of it past the page cache,
            ``mapped_nbytes`` of pages touched in mappings.
        threads: reading threads.
        read_s, cpu_s, wait_s, copy_s: of all its reading threads: in system calls, on a core, waiting for staging, in
            copies to the GPU.
    """

    tp_rank: int
    ep_rank: int
    device: str
    begun: float
    ended: float
    nbytes: int
    read_nbytes: int
    reads: int
    direct_nbytes: int
    mapped_nbytes: int
    threads: int
    read_s: float
    cpu_s: float
    wait_s: float
    copy_s: float

    @property
    def seconds(self) -> float:
        """From this rank's begin to its end."""
        return self.ended - self.begun

    @property
    def gb_per_s(self) -> float:
        """Bytes of the parameters in 10^9 a second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the value for ``--json``."""
        value = asdict(self)
        del value["begun"], value["ended"]
        return {**value, "seconds": self.seconds, "gb_per_s": self.gb_per_s}


def run_rank(job: RankJob, rank: int, ranks: int, end: Connection) -> None:
    """Load whenever ``end`` says so, and send a :class:`RankTurn`; the first answer, None, says that all is ready.

    An error is sent as its text and ends the process.
    """
    torch.set_num_threads(1)
    try:
        # Not by a file:// address, which is not unquoted.
        meeting = dist.FileStore(str(job.store), ranks)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks, timeout=_TIMEOUT)
        with ExpertLoader(job.device, job.options) as loader:
            me = _Rank(job, rank, loader)
            end.send(None)
            while end.recv() == "load":
                end.send(me.turn())
    except (EOFError, BrokenPipeError):
        return
    except NvfpPrepError as error:
        end.send(str(error))
    except Exception as error:
        end.send(f"{type(error).__name__}: {error}")


class _Rank:
    """Parameters, allocated and touched, and the groups of one rank."""

    def __init__(self, job: RankJob, rank: int, loader: ExpertLoader) -> None:
        self._job, self._loader = job, loader
        catalog = Catalog.open(job.path)
        self._parameters: list[SharedParameter] = []
        for path in job.layers:
            layer = catalog.layer(path)
            load = LayerLoad(catalog, layer, RankShare.of(layer.dims.experts, job.tp, job.ep), loader)
            self._parameters += [load.parameter(tensor) for tensor in PreparedTensor]
        for item in self._parameters:
            item.parameter.view(torch.uint8).zero_()
        self._group, self._waiting = self._make_groups() if job.together else (None, None)

    def _make_groups(self) -> tuple[CooperativeGroup | None, Ranks | None]:
        """Make all groups, in the same order in every process, and return this rank's."""
        (_, size), (mine, count) = self._job.tp, self._job.ep
        device, kept = self._loader.device, None
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for number in range(count):
            members = [*range(number * size, (number + 1) * size)]
            waiting = dist.new_group(members, timeout=_TIMEOUT, backend="gloo")
            group = waiting if device.type == "cpu" else dist.new_group(members, timeout=_TIMEOUT, backend="nccl")
            if number == mine:
                kept = CooperativeGroup(group), Ranks(waiting, torch.device("cpu"), _TIMEOUT)
        return kept or (None, None)

    def turn(self) -> RankTurn:
        """Load everything once, at the same time as the others."""
        loading: TakesParameters = self._loader
        if self._group is not None and self._waiting is not None:
            loading = GroupLoader(self._group, self._waiting, self._loader)
        dist.barrier()
        begun = time.monotonic()
        report = self._load(loading)
        return self._figures(report, begun, time.monotonic())

    def _load(self, loading: TakesParameters) -> LoadReport:
        for item in self._parameters:
            loading.submit(item.path, item.record, item.part, item.experts, item.parameter, item.crc32)
        report = loading.finish()
        if self._loader.device.type == "cuda":
            torch.cuda.synchronize(self._loader.device)
        return report

    def _figures(self, report: LoadReport, begun: float, ended: float) -> RankTurn:
        counts, times = report.counts, report.times
        return RankTurn(
            tp_rank=self._job.tp[0],
            ep_rank=self._job.ep[0],
            device=self._job.device,
            begun=begun,
            ended=ended,
            nbytes=sum(item.parameter.numel() for item in self._parameters),
            read_nbytes=counts.nbytes,
            reads=counts.reads,
            direct_nbytes=counts.direct_nbytes,
            mapped_nbytes=counts.mapped_nbytes,
            threads=report.threads,
            read_s=times.read,
            cpu_s=times.cpu,
            wait_s=times.wait,
            copy_s=times.copy,
        )
