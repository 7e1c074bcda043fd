"""Loading experts into GPU memory: the loader, other loaders on original and prepared files, and the bus itself.

    python benchmarks/bench_load.py --directory /mnt/memory [--disk /var/tmp] [--json load.json]

Builds its own files (random bytes at Kimi-K2.5 dimensions, 29 GB in --directory), interleaves all sides, prints tables.
Sides that are not installed (fastsafetensors, instanttensor, runai-model-streamer, vllm) are left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI, PREFIX, LayerFiles, write_layer
from load_rivals import Tensors, available, vllm_preparation
from measuring import RESULTS, MemoryWatch, Side, compare, drop, section

from nvfp4_prep.load import DirectIO, ExpertLoader, LoadOptions, LoadReport
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, rank_slice

LAYOUT = MoeLayout.cutedsl(gated=True)


class Parameters:
    """One rank's prepared parameters of several layers, and the loader's job to fill them."""

    def __init__(self, layers: list[LayerFiles], experts: range, tp: tuple[int, int] = (0, 1), times: int = 1) -> None:
        self.experts = experts
        self.jobs = []
        for _ in range(times):
            for files in layers:
                for tensor in PreparedTensor:
                    part = rank_slice(LAYOUT, tensor, files.dims, *tp)
                    data = torch.empty((len(experts), *part.shape), dtype=torch.uint8, device="cuda")
                    self.jobs.append((files.prepared, files.records[tensor.value], part, data))
        self.nbytes = sum(job[3].numel() for job in self.jobs)

    def load(self, loader: ExpertLoader) -> LoadReport:
        for path, record, part, data in self.jobs:
            loader.submit(path, record, part, self.experts, data)
        return loader.finish()

    def side(self, name: str, loader: ExpertLoader) -> Side:
        return Side(name, self.nbytes, lambda: self.load(loader))


def pinned_side(nbytes: int) -> Side:
    """The limit: the same number of bytes from one pinned buffer that is larger than any cache."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    host.view(torch.int64).random_()
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def run() -> None:
        left = nbytes
        while left > 0:
            size = min(left, len(host))
            device[:size].copy_(host[:size], non_blocking=True)
            left -= size
        torch.cuda.synchronize()

    return Side("pinned copy (limit)", nbytes, run)


def original_sides(layers: list[LayerFiles], experts: int) -> list[Side]:
    """Per-expert tensors into stacked parameters, then vLLM's preparation of each layer."""
    prepare = vllm_preparation()
    raw = [original_parameters(experts) for _ in layers]
    places: dict[str, torch.Tensor] = {}
    for files, params in zip(layers, raw, strict=True):
        places |= places_of(files.layer, experts, params)
    nbytes = sum(tensor.numel() * tensor.element_size() for params in raw for tensor in params.values())
    paths = [files.original for files in layers if files.original is not None]

    def load(read: Callable[[list[Path]], Tensors]) -> None:
        for name, tensor in read(paths):
            places[name].copy_(tensor)
        if prepare is not None:
            for params in raw:
                prepare(params)

    label = " + vLLM's preparation" if prepare is not None else " (no preparation)"
    return [
        Side(f"original, {name} {version}{label}", nbytes, lambda read=read: load(read))
        for name, (version, read) in available().items()
    ]


def original_parameters(experts: int) -> dict[str, torch.Tensor]:
    big = {
        "w13_weight": (2 * KIMI.intermediate, KIMI.hidden // 2, torch.uint8),
        "w13_weight_scale": (2 * KIMI.intermediate, KIMI.hidden // 16, torch.float8_e4m3fn),
        "w2_weight": (KIMI.hidden, KIMI.intermediate // 2, torch.uint8),
        "w2_weight_scale": (KIMI.hidden, KIMI.intermediate // 16, torch.float8_e4m3fn),
    }
    params = {
        name: torch.empty((experts, rows, cols), dtype=dtype, device="cuda")
        for name, (rows, cols, dtype) in big.items()
    }
    for name in ("w13_weight_scale_2", "w13_input_scale"):
        params[name] = torch.ones((experts, 2), device="cuda")
    for name in ("w2_weight_scale_2", "w2_input_scale"):
        params[name] = torch.ones(experts, device="cuda")
    return params


def places_of(layer: int, experts: int, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    half = KIMI.intermediate
    places = {}
    for expert in range(experts):
        for name, side, rows, column in (
            ("gate_proj", "w13", slice(0, half), 0),
            ("up_proj", "w13", slice(half, 2 * half), 1),
            ("down_proj", "w2", slice(None), None),
        ):
            key = f"{PREFIX.format(layer=layer)}.{expert}.{name}"
            places[f"{key}.weight"] = params[f"{side}_weight"][expert, rows]
            places[f"{key}.weight_scale"] = params[f"{side}_weight_scale"][expert, rows]
            for leaf in ("weight_scale_2", "input_scale"):
                scalar = params[f"{side}_{leaf}"][expert]
                places[f"{key}.{leaf}"] = scalar if column is None else scalar[column]
    return places


def prepared_sides(paths: list[Path], layers: list[LayerFiles], experts: int) -> tuple[list[Side], Parameters]:
    """The prepared files through the same libraries: tensors straight into the final parameters."""
    params = Parameters(layers, range(experts))
    places = {job[1].name: job[3] for job in params.jobs}

    def load(read: Callable[[list[Path]], Tensors]) -> None:
        for name, tensor in read(paths):
            places[name].copy_(tensor.view(torch.uint8))

    sides = [
        Side(f"prepared, {name} {version}", params.nbytes, lambda read=read: load(read))
        for name, (version, read) in available().items()
    ]
    return sides, params


def main() -> None:
    arguments = parse()
    describe(arguments)
    base, share = arguments.directory, range(144, 192)
    layers: list[LayerFiles] = []
    compact: list[LayerFiles] = []
    device = torch.device("cuda")
    begun = time.perf_counter()
    for layer in range(1, arguments.layers + 1):
        files = write_layer(base / "full", layer, KIMI, share, device, original=base / "original", mirror=base / "few")
        layers.append(files)
        path = base / "few" / files.prepared.name
        few = MoeDims(len(share), KIMI.intermediate, KIMI.hidden)
        compact.append(LayerFiles(layer, few, path, records_of(path), None, {}))
    print(f"files built in {time.perf_counter() - begun:.1f} s", flush=True)
    section("sweep", lambda: sweep(layers, share, arguments))
    print(f"options of the following tables: {arguments.options}", flush=True)
    if arguments.sweep_only:
        return
    with ExpertLoader("cuda", arguments.options) as loader:
        section("sides", lambda: all_sides(layers, compact, share, loader, arguments))
        section("shares", lambda: shares(layers, share, loader, arguments))
    section("memory", lambda: memory(layers, share, arguments))
    if arguments.disk is not None:
        section("cold disk", lambda: cold(share, arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(RESULTS, indent=1, default=str))


def records_of(path: Path) -> dict[str, Any]:
    from nvfp4_prep.safetensors_io import read_header

    return {record.name.rsplit(".", 1)[1]: record for record in read_header(path).tensors}


def all_sides(
    layers: list[LayerFiles],
    compact: list[LayerFiles],
    share: range,
    loader: ExpertLoader,
    arguments: argparse.Namespace,
) -> None:
    ours = Parameters(layers, share)
    prepared, theirs = prepared_sides([files.prepared for files in compact], compact, len(share))
    sides = [
        *original_sides(layers, len(share)),
        *prepared,
        ours.side("prepared, nvfp4_prep.load", loader),
        pinned_side(ours.nbytes),
    ]
    compare(f"EP8 share of {len(layers)} Kimi-K2.5 layers ({len(share)} of 384 experts)", sides, arguments.repeats)
    equal = all(torch.equal(a[3], b[3]) for a, b in zip(ours.jobs, theirs.jobs, strict=True))
    print(f"\nparameters bit-equal to those of the other loaders on prepared files: {equal}")
    RESULTS["bit_equal"] = equal


def shares(layers: list[LayerFiles], share: range, loader: ExpertLoader, arguments: argparse.Namespace) -> None:
    one = layers[:1]
    sets = {
        "EP8, one layer": Parameters(one, share),
        f"EP8, {5 * len(layers)} layers": Parameters(layers, share, times=5),
        f"EP8 x TP2, {len(layers)} layers": Parameters(layers, share, (1, 2)),
        f"EP8 x TP8, {len(layers)} layers": Parameters(layers, share, (3, 8)),
    }
    sides = [params.side(name, loader) for name, params in sets.items()]
    full = arguments.directory / "whole"
    files = write_layer(full, 9, KIMI, range(KIMI.experts), torch.device("cuda"))
    every = range(KIMI.experts)
    sides += [
        Parameters([files], every, tp).side(name, loader)
        for name, tp in (("full layer, TP1", (0, 1)), ("full layer, TP2", (1, 2)), ("full layer, TP8", (5, 8)))
    ]
    sides.append(pinned_side(sets[f"EP8, {5 * len(layers)} layers"].nbytes))
    compare("Shares, memory-backed files", sides, arguments.repeats)


def sweep(layers: list[LayerFiles], share: range, arguments: argparse.Namespace) -> None:
    params = Parameters(layers, share)
    sides, loaders = [], []
    for threads, chunk_mib, buffers in arguments.sweep:
        options = LoadOptions(threads, int(chunk_mib * 2**20), buffers)
        begun = time.perf_counter()
        loader = ExpertLoader("cuda", options)
        setup = time.perf_counter() - begun
        loaders.append(loader)
        size = f"{options.staging_nbytes / 2**20:.0f} MiB, made in {setup * 1e3:.0f} ms"
        sides.append(params.side(f"{threads} threads, {buffers} x {chunk_mib:g} MiB ({size})", loader))
    compare("Threads and staging", sides, arguments.repeats)
    print("\nseconds of all threads together in the last turn: reading, waiting for a buffer, processor, submitting")
    for side in sides:
        if side.report is not None:
            t = side.report.times
            print(f"- {side.name}: {t.read:.3f} {t.wait:.3f} {t.cpu:.3f} {t.submit:.3f}")
    if arguments.best and any(side.seconds for side in sides):
        timed_sides = [(statistics.median(side.seconds), n) for n, side in enumerate(sides) if side.seconds]
        arguments.options = loaders[min(timed_sides)[1]].options
    RESULTS["options"] = dataclasses.asdict(arguments.options)
    for loader in loaders:
        loader.close()


def memory(layers: list[LayerFiles], share: range, arguments: argparse.Namespace) -> None:
    params = Parameters(layers, share)
    with MemoryWatch() as watch, ExpertLoader("cuda", arguments.options) as loader:
        params.load(loader)
        staging = loader.options.staging_nbytes
    text = (
        f"pinned staging {staging / 2**20:.0f} MiB, other host memory {watch.extra_host / 2**20:.0f} MiB, "
        f"device memory: torch {watch.extra_torch / 2**20:.0f} MiB, driver {watch.extra_device / 2**20:.0f} MiB"
    )
    print(f"\nextra memory of a load at its peak: {text}")
    RESULTS["extra_memory"] = text


def cold(share: range, arguments: argparse.Namespace) -> None:
    base = arguments.disk / "nvfp4-prep-bench"
    few = range(share.start, share.start + 24)
    device = torch.device("cuda")
    files = write_layer(base / "full", 1, KIMI, few, device, original=base / "original")
    params = Parameters([files], few)
    ways = {"direct I/O": DirectIO.ALWAYS, "page cache": DirectIO.NEVER, "automatic": DirectIO.AUTO}
    loaders = {name: ExpertLoader("cuda", LoadOptions(direct_io=way)) for name, way in ways.items()}
    sides = [params.side(f"prepared, nvfp4_prep.load, {name}", loader) for name, loader in loaders.items()]
    tp = Parameters([files], few, (3, 8))
    sides.append(tp.side("prepared, nvfp4_prep.load, TP8 share", loaders["automatic"]))
    sides += [side for side in original_sides([files], len(few)) if "Run:ai" not in side.name]
    paths = [files.prepared, *([files.original] if files.original else [])]
    compare("Cold disk, 24 experts of one layer", sides, 2, before=lambda: drop(paths))
    for loader in loaders.values():
        loader.close()
    for path in paths:
        path.unlink()


def describe(arguments: argparse.Namespace) -> None:
    RESULTS["machine"] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "options": str(arguments.options),
    }
    print(json.dumps(RESULTS["machine"]), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="memory-backed directory for 29 GB of files")
    parser.add_argument("--disk", type=Path, help="directory on a disk, for the cold figures")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--chunk-mib", type=float, default=LoadOptions().chunk_nbytes / 2**20)
    parser.add_argument("--buffers", type=int, default=LoadOptions().buffers)
    parser.add_argument(
        "--sweep",
        default="4,4,8 8,4,12 10,4,14 12,4,16 12,4,20 14,4,18 14,4,22 16,4,22 12,2,20 14,2,24 16,2,28 12,3,18 12,8,18",
        help="threads,chunk MiB,buffers of each point",
    )
    parser.add_argument("--sweep-only", action="store_true", help="leave the other tables out")
    parser.add_argument("--best", action="store_true", help="use the fastest point of the sweep for the other tables")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    points = [point.split(",") for point in arguments.sweep.split()]
    arguments.sweep = [(int(t), float(c), int(b)) for t, c, b in points]
    arguments.options = LoadOptions(arguments.threads, int(arguments.chunk_mib * 2**20), arguments.buffers)
    return arguments


if __name__ == "__main__":
    main()
