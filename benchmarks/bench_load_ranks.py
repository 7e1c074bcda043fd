"""All ranks of one host at once: experts, columns gathered from a mapping, whole rows, and the cooperative load.

    python benchmarks/bench_load_ranks.py [--directory /dev/shm] [--experts 128] [--json ranks.json]

One layer at Kimi-K2.5's dimensions (random bytes, 24.8 MB an expert) is loaded by one process a rank: two ranks, then
eight, spread over the GPUs. Sides are interleaved. Seconds are the host's: from the first rank's begin to the last
one's end. Bytes and reads are those of all ranks together. NCCL takes one rank a GPU, so a side that needs more is left
out. *as a server* is what vLLM and SGLang get: rows of w13 are read from the start, then columns of w2 are exchanged.
*anywhere* does not keep threads and staging on the GPU's NUMA node, where that is known. *kvikio*, if it is installed,
reads the same contiguous shares with as many threads and tasks of 4 MiB (POSIX mode, through its bounce buffers).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from load_data import KIMI, LayerFiles, write_layer
from machine import facts
from measuring import spread

from nvfp4_prep._util.limits import usable_cores
from nvfp4_prep.load import CooperativeGroup, ExpertLoader, Gather, GroupLoader, LoadOptions, LoadReport, RankShare
from nvfp4_prep.load import loader as loader_module
from nvfp4_prep.load.cooperative import CooperativeLoad, SharedParameter
from nvfp4_prep.load.numa import near_processors
from nvfp4_prep.load.ranks import Ranks
from nvfp4_prep.load.reader import ReadCounts
from nvfp4_prep.load.worker import Times
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, rank_slice

LAYOUT = MoeLayout.cutedsl(gated=True)
SMALL = (512, 512)
"""Sizes of ``--small``, where no GPU is: to see that it runs."""


@dataclass(frozen=True)
class World:
    """The processes of one part of the benchmark.

    Attributes:
        files: the layer.
        ranks: processes.
        device: ``cuda`` or ``cpu``.
        threads: reading threads a rank.
        repeats: of every side, after one that is not timed.
        exchange_mib: device memory of the cooperative sides.
        rendezvous: file that does not exist yet.
    """

    files: LayerFiles
    ranks: int
    device: str
    threads: int
    repeats: int
    exchange_mib: tuple[int, ...]
    rendezvous: Path

    @property
    def gpus(self) -> int:
        return torch.cuda.device_count() if self.device == "cuda" else 0

    @property
    def refusal(self) -> str:
        """Why the ranks cannot exchange, or nothing."""
        if self.device == "cuda" and self.ranks > self.gpus:
            return f"NCCL takes one rank a GPU: {self.ranks} ranks, {self.gpus} GPUs"
        return ""


class Rank:
    """One process: its parameters and its loaders."""

    def __init__(self, world: World, rank: int, group: dist.ProcessGroup | None) -> None:
        self.world, self.rank, self.group = world, rank, group
        self.device = torch.device("cpu")
        if world.device == "cuda":
            self.device = torch.device("cuda", rank % world.gpus)
            torch.cuda.set_device(self.device)
        self.loaders = {
            gather: ExpertLoader(self.device, LoadOptions(threads=world.threads, gather=gather))
            for gather in (Gather.ROWS, Gather.MMAP)
        }
        self.near = near_processors(self.device, world.threads)
        self.anywhere = self.unbound() if self.near is not None else None
        dims = world.files.dims
        self.experts = self.parameters(RankShare.of(dims.experts, ep=(rank, world.ranks)))
        self.columns = self.parameters(RankShare.of(dims.experts, tp=(rank, world.ranks)))

    def unbound(self) -> ExpertLoader:
        """A loader whose threads and staging are wherever the system puts them."""
        with mock.patch.object(loader_module, "near_processors", lambda *_: None):
            return ExpertLoader(self.device, LoadOptions(threads=self.world.threads, gather=Gather.ROWS))

    def parameters(self, share: RankShare) -> list[SharedParameter]:
        files, experts = self.world.files, share.experts or ()
        made = []
        for tensor in PreparedTensor:
            part = rank_slice(LAYOUT, tensor, files.dims, share.tp_rank, share.tp_size)
            data = torch.zeros((len(experts), *part.shape), dtype=torch.uint8, device=self.device)
            record = files.records[tensor.value]
            made.append(SharedParameter(files.prepared, record, part, experts, data, None))
        return made

    def alone(self, parameters: list[SharedParameter], loader: ExpertLoader) -> LoadReport:
        for item in parameters:
            item.submit(loader)
        return loader.finish()

    def together(self, group: dist.ProcessGroup, exchange_mib: int) -> LoadReport:
        loader, (*w13, w2, w2_scale) = self.loaders[Gather.ROWS], self.ordered()
        load = CooperativeLoad(CooperativeGroup(group, exchange_mib << 20, timedelta(seconds=60)), loader)
        with load.preparing():
            load.begin([w2, w2_scale], w13)
        return load.complete()

    def as_a_server(self, group: dist.ProcessGroup) -> LoadReport:
        """The tensors in a model's order; the first wait of the ranks is on the CPU."""
        waiting = Ranks(dist.distributed_c10d._get_default_group(), torch.device("cpu"), timedelta(seconds=60))
        loading = GroupLoader(CooperativeGroup(group), waiting, self.loaders[Gather.ROWS])
        for item in self.columns:
            loading.submit(item.path, item.record, item.part, item.experts, item.parameter)
        return loading.finish()

    def with_kvikio(self) -> LoadReport:
        """Experts of this rank: one range of the file for each tensor."""
        import kvikio

        begun, counts = time.perf_counter(), ReadCounts()
        with kvikio.CuFile(self.world.files.prepared, "r") as file:
            futures = []
            for item in self.experts:
                offset = item.record.offset_bytes + item.experts[0] * item.whole.nbytes
                flat = item.parameter.view(torch.uint8).view(-1)
                futures.append(file.pread(flat, size=flat.numel(), file_offset=offset))
            counts.read_nbytes = sum(future.get() for future in futures)
        return LoadReport(time.perf_counter() - begun, counts.read_nbytes, counts, Times(), self.world.threads)

    def ordered(self) -> list[SharedParameter]:
        """The columns' parameters, those of w2 last."""
        named = dict(zip(PreparedTensor, self.columns, strict=True))
        return [named[tensor] for tensor in sorted(named, key=lambda tensor: (not tensor.is_w13, tensor.is_scale))]

    def sides(self) -> dict[str, tuple[list[SharedParameter], Callable[[], LoadReport]]]:
        ranks, columns, group = self.world.ranks, self.columns, self.group
        rows, mapping, anywhere = self.loaders[Gather.ROWS], self.loaders[Gather.MMAP], self.anywhere
        made: dict[str, tuple[list[SharedParameter], Callable[[], LoadReport]]] = {
            f"EP{ranks}": (self.experts, lambda: self.alone(self.experts, rows)),
            f"TP{ranks} mapping": (columns, lambda: self.alone(columns, mapping)),
            f"TP{ranks} rows": (columns, lambda: self.alone(columns, rows)),
        }
        if group is not None:
            for mib in self.world.exchange_mib:
                made[f"TP{ranks} cooperative {mib} MiB"] = (columns, lambda mib=mib: self.together(group, mib))
            made[f"TP{ranks} as a server"] = (columns, lambda: self.as_a_server(group))
        if anywhere is not None:
            made[f"EP{ranks} anywhere"] = (self.experts, lambda: self.alone(self.experts, anywhere))
        if self.device.type == "cuda" and kvikio_installed():
            made[f"EP{ranks} kvikio"] = (self.experts, self.with_kvikio)
        return made


@functools.cache
def kvikio_installed() -> bool:
    """Whether it can be imported; tells why not where it is there."""
    try:
        importlib.import_module("kvikio")
    except ImportError as error:
        print(f"without kvikio: {error}", flush=True)
        return False
    return True


def run_rank(world: World, rank: int, results: Any) -> None:
    """One process from begin to end; rank 0 puts the rows into ``results``."""
    torch.set_num_threads(1)
    # Before kvikio is imported: it reads them then.
    os.environ |= {"KVIKIO_COMPAT_MODE": "ON", "KVIKIO_NTHREADS": str(world.threads), "KVIKIO_TASK_SIZE": f"{4 << 20}"}
    os.environ["KVIKIO_BOUNCE_BUFFER_SIZE"] = f"{4 << 20}"
    dist.init_process_group(
        "gloo", init_method=world.rendezvous.as_uri(), rank=rank, world_size=world.ranks, timeout=timedelta(minutes=4)
    )
    group = None
    if not world.refusal:
        if world.device == "cuda":
            torch.cuda.set_device(rank % world.gpus)
        group = dist.new_group(backend="nccl" if world.device == "cuda" else "gloo")
    me = Rank(world, rank, group)
    reference: dict[str, list[torch.Tensor]] = {}
    turns: dict[str, list[list[Any]]] = {name: [] for name in me.sides()}
    for turn in range(world.repeats + 1):
        for name, (parameters, load) in me.sides().items():
            check, kind = turn == 0, name[:2]
            if check:
                for item in parameters:
                    item.parameter.zero_()
            mine = timed(load, me.device)
            if check:
                expected = reference.setdefault(kind, [item.parameter.clone() for item in parameters])
                mine["equal"] = all(map(torch.equal, expected, (item.parameter for item in parameters)))
            everyone: list[Any] = [None] * world.ranks
            dist.all_gather_object(everyone, mine)
            turns[name].append(everyone)
    for loader in filter(None, (*me.loaders.values(), me.anywhere)):
        loader.close()
    if rank == 0:
        near = None if me.near is None else len(me.near)
        results.put([row(name, world, done) | {"near_processors": near} for name, done in turns.items()])
    dist.barrier()
    dist.destroy_process_group()


class Phases:
    """Seconds that the calling thread of a cooperative load waits: for reads of w2, for other ranks, for the rest."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(
            ("reads of a round", "exchange and other ranks", "reads after the last round"), 0.0
        )
        self._patches = [
            mock.patch.object(owner, name, self._around(getattr(owner, name), phase))
            for phase, (owner, name) in zip(
                self.seconds,
                ((ExpertLoader, "wait_for"), (Ranks, "_wait"), (ExpertLoader, "finish")),
                strict=True,
            )
        ]

    def __enter__(self) -> Phases:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _around(self, wrapped: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed_call(*args: Any, **kw: Any) -> Any:
            begun = time.perf_counter()
            try:
                return wrapped(*args, **kw)
            finally:
                self.seconds[phase] += time.perf_counter() - begun

        return timed_call


def timed(load: Callable[[], LoadReport], device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    dist.barrier()
    with Phases() as phases:
        begun = time.monotonic()
        report = load()
        if on_gpu:
            torch.cuda.synchronize()
        ended = time.monotonic()
    extra = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return {
        "begun": begun,
        "ended": ended,
        "reads": report.counts.reads,
        "read_nbytes": report.counts.nbytes,
        "times": asdict(report.times),
        "phases": phases.seconds,
        "device_nbytes": extra,
    }


def row(name: str, world: World, turns: list[list[Any]]) -> dict[str, Any]:
    """Of all ranks together; the first turn, which compares, is not timed."""
    seconds = [max(r["ended"] for r in turn) - min(r["begun"] for r in turn) for turn in turns[1:]]
    last, file_nbytes = turns[-1], sum(record.nbytes for record in world.files.records.values())
    made: dict[str, Any] = {"side": name, "ranks": world.ranks, "gpus": world.gpus, "threads": world.threads}
    made |= {"nbytes": file_nbytes, "seconds": seconds, **spread(seconds)}
    made |= {"gb_per_s": file_nbytes / made["median"] / 1e9}
    made |= {f"{key}": sum(r[key] for r in last) for key in ("reads", "read_nbytes")}
    made |= {"device_nbytes": max(r["device_nbytes"] for turn in turns for r in turn), "rank_0_times": last[0]["times"]}
    made |= {"rank_phases": [r["phases"] for r in last], "rank_seconds": [r["ended"] - r["begun"] for r in last]}
    return made | {"bit_equal": all(r["equal"] for r in turns[0])}


def measure(world: World) -> list[dict[str, Any]]:
    """Start the processes of a world and return rank 0's rows."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=run_rank, args=(world, rank, results)) for rank in range(world.ranks)]
    for process in ranks:
        process.start()
    while results.empty() and all(process.exitcode in (None, 0) for process in ranks):
        time.sleep(0.1)
    rows: list[dict[str, Any]] = [] if results.empty() else results.get()
    for process in ranks:
        process.join(10 if rows else 0)
        process.kill()
    if not rows:
        raise RuntimeError(f"a process of {world.ranks} failed: exit codes {[process.exitcode for process in ranks]}")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("\n| side | GPUs | threads | min s | median s | max s | GB/s | read / file | reads | device MiB | equal |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for made in rows:
        print(
            f"| {made['side']} | {made['gpus']} | {made['threads']} | {made['min']:.4f} | {made['median']:.4f}"
            f" | {made['max']:.4f} | {made['gb_per_s']:.1f} | {made['read_nbytes'] / made['nbytes']:.3f}"
            f" | {made['reads']} | {made['device_nbytes'] / 2**20:.0f} | {made['bit_equal']} |",
            flush=True,
        )


def main() -> None:
    arguments = parse()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not to be had on every machine
    base = Path(tempfile.mkdtemp(dir=arguments.directory, prefix="nvfp4-prep-ranks-"))
    intermediate, hidden = SMALL if arguments.small else (KIMI.intermediate, KIMI.hidden)
    rows, skipped, failed = [], [], []
    try:
        begun = time.perf_counter()
        dims = MoeDims(arguments.experts, intermediate, hidden)
        files = write_layer(base, 1, dims, range(dims.experts), torch.device(arguments.device), batch=8)
        print(f"file built in {time.perf_counter() - begun:.1f} s", flush=True)
        for ranks in arguments.ranks:
            threads = arguments.threads or max(2, min(12, usable_cores() * 3 // 4 // ranks))
            options = (ranks, arguments.device, threads, arguments.repeats, tuple(arguments.exchange_mib))
            world = World(files, *options, base / f"rendezvous-{ranks}")
            if world.refusal:
                skipped.append({"side": f"TP{ranks} cooperative", "reason": world.refusal})
                print(f"\nTP{ranks} cooperative left out: {world.refusal}", flush=True)
            try:
                found = measure(world)
            except RuntimeError as error:
                failed.append(str(error))
                print(f"\n{error}", flush=True)
                continue
            show(found)
            rows += found
    finally:
        shutil.rmtree(base)
    if arguments.json is not None:
        figures = {"machine": facts(), "repetitions": arguments.repeats, "experts": arguments.experts}
        figures |= {"device": arguments.device, "rows": rows, "skipped": skipped, "failed": failed}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    raise SystemExit(bool(failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where the file is made and removed")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--threads", type=int, default=0, help="reading threads a rank; 0: the ranks share the cores")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exchange-mib", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small matrices, to see that it runs")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
