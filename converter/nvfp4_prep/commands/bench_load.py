"""Measurement of a load before it is decided on: all ranks of a host at once, from storage into their parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from nvfp4_prep._util.arguments import COUNT, FLAG, PATH, THREADS, checked, integer, one_of, optional
from nvfp4_prep._util.limits import usable_cores
from nvfp4_prep.commands.bench_load_figures import LoadBench, LoadFigures, find_limit
from nvfp4_prep.commands.bench_load_processes import RankProcesses
from nvfp4_prep.commands.bench_load_rank import RankJob, RankTurn
from nvfp4_prep.errors import UsageError
from nvfp4_prep.load import Catalog, LoadOptions
from nvfp4_prep.load.options import rank_threads
from nvfp4_prep.load.page_cache import cached_share, forget
from nvfp4_prep.load.storage import storage_of
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep_kernels import LayoutError, PreparedTensor, rank_slice

__all__ = ["bench_load"]

MAX_RANKS = 64


@checked(
    path=PATH,
    tp=integer(1, MAX_RANKS),
    ep=integer(1, MAX_RANKS),
    layers=COUNT,
    device=optional(one_of("cuda", "cpu")),
    threads=optional(THREADS),
    repeats=integer(1, 1000),
    cold=optional(FLAG),
    together=FLAG,
)
def bench_load(
    path: Path | str,
    *,
    tp: int = 1,
    ep: int = 1,
    layers: int = 1,
    device: str | None = None,
    threads: int | None = None,
    repeats: int = 3,
    cold: bool | None = None,
    together: bool = True,
) -> LoadBench:
    """Load layers with as many processes as ranks, all at once, and say how fast it was and what limited it.

    Each process holds its rank's parameters, allocated before the time begins: memory of the layers' experts, spread
    over the GPUs, or host memory where there are none. The processes do not run the caller's script, so that needs no
    ``if __name__ == "__main__":``.

    Args:
        path: a directory that ``nvfp4-prep convert`` wrote.
        tp, ep: sizes of tensor and expert parallelism; ``tp * ep`` processes.
        layers: how many, from the first one on.
        device: ``cuda`` or ``cpu``; by default GPUs where there are any.
        threads: reading threads a rank; by default its part of the cores.
        repeats: turns of each kind.
        cold: True to take the files out of the page cache before every turn, False to leave them in it; None for both.
        together: let tensor-parallel ranks read each byte once and exchange columns, where they can.

    Raises:
        CheckpointError: if the directory is not a complete prepared checkpoint.
        UsageError: if the file does not serve these sizes, or an argument makes no sense.
        LoadError: if a rank fails or does not answer.
    """
    catalog = Catalog.open(path)
    chosen = catalog.manifest.layers[:layers]
    if not chosen:
        raise UsageError("has no prepared layers", where=str(path))
    if len(chosen) < layers:
        there = f"at most {len(chosen)}"
        raise UsageError("has fewer prepared layers", where=str(path), expected=there, actual=f"--layers {layers}")
    _check_shares(chosen, tp, ep)
    devices = _devices(device, tp * ep)
    alone_because = _alone_because(tp, devices, together)
    options = LoadOptions(threads=threads or rank_threads(tp * ep))
    names = tuple(layer.experts_path for layer in chosen)
    job = partial(RankJob, path=catalog.root, layers=names, options=options, together=not alone_because)
    with tempfile.TemporaryDirectory(prefix="nvfp4-prep-bench-") as folder:
        jobs = [
            job(tp=(rank % tp, tp), ep=(rank // tp, ep), device=name, store=Path(folder) / "store")
            for rank, name in enumerate(devices)
        ]
        figures = _measure_all(jobs, _files(catalog, chosen), (True, False) if cold is None else (cold,), repeats)
    return LoadBench(
        path=catalog.root,
        storage=storage_of(catalog.root),
        layers=len(chosen),
        all_layers=len(catalog.manifest.layers),
        nbytes=sum(map(_nbytes, chosen)),
        all_nbytes=sum(map(_nbytes, catalog.manifest.layers)),
        tp=tp,
        ep=ep,
        devices=devices,
        threads=options.thread_count,
        together=not alone_because,
        alone_because=alone_because,
        figures=figures,
    )


def _files(catalog: Catalog, layers: Sequence[LayerRecord]) -> list[Path]:
    return sorted({catalog.root / record.file for layer in layers for record in catalog.records(layer).values()})


def _measure_all(
    jobs: Sequence[RankJob], files: Sequence[Path], kinds: Sequence[bool], repeats: int
) -> tuple[LoadFigures, ...]:
    with RankProcesses(jobs) as ranks:
        return tuple(_measure(ranks, files, kind, repeats) for kind in kinds)


def _measure(ranks: RankProcesses, files: Sequence[Path], cold: bool, repeats: int) -> LoadFigures:
    """Measure all turns of one kind, after one that warms up where the files shall be in the page cache."""
    if not cold:
        ranks.turn()
    turns: list[tuple[float, tuple[RankTurn, ...]]] = []
    shares = []
    for _ in range(repeats):
        if cold:
            forget(files)
        shares.append(cached_share(files))
        found = ranks.turn()
        turns.append((max(rank.ended for rank in found) - min(rank.begun for rank in found), found))
    seconds, median = sorted(turns, key=lambda turn: turn[0])[(len(turns) - 1) // 2]
    every = tuple(turn[0] for turn in turns)
    return LoadFigures(cold, max(shares), every, median, find_limit(median, seconds, usable_cores()))


def _check_shares(layers: Sequence[LayerRecord], tp: int, ep: int) -> None:
    if tp * ep > MAX_RANKS:
        raise UsageError("too many ranks for one host", expected=f"at most {MAX_RANKS}", actual=f"{tp} x {ep}")
    for layer in layers:
        if layer.dims.experts < ep:
            raise UsageError("fewer experts than ranks", where=layer.experts_path, actual=layer.dims.experts)
        try:
            rank_slice(layer.layout, PreparedTensor.W2_WEIGHT, layer.dims, 0, tp)
        except LayoutError as error:
            raise UsageError(str(error), where=layer.experts_path) from error


def _devices(wanted: str | None, ranks: int) -> tuple[str, ...]:
    gpus = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not gpus:
        raise UsageError("no CUDA GPU here", next_step="Leave --device out: the CPU's memory takes the place of one.")
    return tuple(f"cuda:{rank % gpus}" if gpus else "cpu" for rank in range(ranks))


def _alone_because(tp: int, devices: Sequence[str], together: bool) -> str:
    """Return why the ranks of a tensor-parallel group do not load together; nothing if they do."""
    if tp == 1:
        return "there is one tensor-parallel rank"
    if not together:
        return "so asked for"
    if devices[0] != "cpu" and len(set(devices)) < len(devices):
        return "NCCL takes one rank a GPU"
    return ""


def _nbytes(layer: LayerRecord) -> int:
    return sum(layer.dims.experts * layer.layout.expert_nbytes(tensor, layer.dims) for tensor in PreparedTensor)
