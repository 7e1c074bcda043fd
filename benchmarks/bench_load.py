"""Loading experts into GPU memory: the loader, other loaders on original and prepared files, and the bus itself.

    python benchmarks/bench_load.py --directory /mnt/memory [--disk /var/tmp] [--json load.json]

Builds its own files (random bytes at Kimi-K2.5 dimensions, 24 GB in --directory), interleaves all sides, prints tables.
Sides that are not installed (fastsafetensors, instanttensor, runai-model-streamer, vllm) are left out and named. Exit
code 1 if a section failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI, LayerFiles, write_layer
from load_sides import Parameters, original_sides, pinned_side, prepared_sides
from measuring import MemoryWatch, compare
from page_cache import drop

from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.load import DirectIO, ExpertLoader, LoadOptions
from nvfp4_prep_kernels import MoeDims

SHARE = range(144, 192)
"""Experts of rank 3 of 8."""
COLD_EXPERTS = 24
SWEEP = "4,4,8 8,4,12 10,4,14 12,4,16 12,4,20 14,4,18 14,4,22 16,4,22 12,2,20 14,2,24 16,2,28 12,3,18 12,8,18"


def main() -> None:
    arguments = parse()
    figures: dict[str, Any] = {"repetitions": arguments.repeats, "layers": arguments.layers, "experts": len(SHARE)}
    layers, compact = write_files(arguments)
    failed = []

    def section(name: str, run: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        try:
            figures[name] = run()
        except Exception:
            print(f"\nsection {name} failed:\n{traceback.format_exc()}", flush=True)
            failed.append(name)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"({name}: {time.perf_counter() - begun:.1f} s)", flush=True)

    section("sweep", lambda: sweep(layers, arguments))
    options = arguments.options
    figures["options"] = dataclasses.asdict(options)
    figures["options"] |= {"thread_count": options.thread_count, "buffer_count": options.buffer_count}
    print(f"options of the following tables: {arguments.options}", flush=True)
    if not arguments.sweep_only:
        with ExpertLoader("cuda", arguments.options) as loader:
            section("sides", lambda: all_sides(layers, compact, loader, arguments, figures))
            section("shares", lambda: shares(layers, loader, arguments))
        section("extra_memory", lambda: memory(layers, arguments))
        if arguments.disk is not None:
            section("cold", lambda: cold(arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**figures, "failed": failed}, indent=1) + "\n")
    sys.exit(bool(failed))


def write_files(arguments: argparse.Namespace) -> tuple[list[LayerFiles], list[LayerFiles]]:
    """Layers of 384 experts of which the share has bytes, and the same bytes in files of the share alone."""
    base, begun = arguments.directory, time.perf_counter()
    layers, compact = [], []
    few = MoeDims(len(SHARE), KIMI.intermediate, KIMI.hidden)
    for layer in range(1, arguments.layers + 1):
        files = write_layer(
            base / "full", layer, KIMI, SHARE, torch.device("cuda"), original=base / "original", mirror=base / "few"
        )
        layers.append(files)
        path = base / "few" / files.prepared.name
        records = {record.name.rsplit(".", 1)[1]: record for record in read_header(path).tensors}
        compact.append(LayerFiles(layer, few, path, records, None, {}))
    print(f"files built in {time.perf_counter() - begun:.1f} s", flush=True)
    return layers, compact


def sweep(layers: list[LayerFiles], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Threads, chunk sizes and numbers of buffers; ``--best`` takes the fastest for what follows."""
    params = Parameters(layers, SHARE)
    sides, loaders = [], []
    for threads, chunk_mib, buffers in arguments.sweep:
        begun = time.perf_counter()
        loader = ExpertLoader("cuda", LoadOptions(threads, int(chunk_mib * 2**20), buffers))
        setup = time.perf_counter() - begun
        loaders.append(loader)
        facts = {"threads": threads, "chunk_mib": chunk_mib, "buffers": buffers}
        facts |= {"staging_nbytes": loader.options.staging_nbytes, "staging_s": setup}
        sides.append(params.side(f"{threads} threads, {buffers} x {chunk_mib:g} MiB", loader, **facts))
    rows = compare("Threads and staging", sides, arguments.repeats)
    timed = [(statistics.median(side.seconds), number) for number, side in enumerate(sides) if side.seconds]
    if arguments.best and timed:
        arguments.options = loaders[min(timed)[1]].options
    for loader in loaders:
        loader.close()
    return rows


def all_sides(
    layers: list[LayerFiles],
    compact: list[LayerFiles],
    loader: ExpertLoader,
    arguments: argparse.Namespace,
    figures: dict[str, Any],
) -> list[dict[str, Any]]:
    ours = Parameters(layers, SHARE)
    prepared, theirs = prepared_sides(compact, len(SHARE))
    sides = [
        *original_sides(layers, len(SHARE)),
        *prepared,
        ours.side("prepared, nvfp4_prep.load", loader, way="ours"),
        pinned_side(ours.nbytes),
    ]
    title = f"EP8 share of {len(layers)} Kimi-K2.5 layers ({len(SHARE)} of 384 experts)"
    rows = compare(title, sides, arguments.repeats)
    equal = all(torch.equal(a[3], b[3]) for a, b in zip(ours.jobs, theirs.jobs, strict=True))
    print(f"\nparameters bit-equal to those of the other loaders on prepared files: {equal}")
    figures["bit_equal"] = equal
    return rows


def shares(layers: list[LayerFiles], loader: ExpertLoader, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    count = len(layers)
    files = write_layer(arguments.directory / "whole", 9, KIMI, range(KIMI.experts), torch.device("cuda"))
    every = range(KIMI.experts)
    sets = {
        "EP8, one layer": Parameters(layers[:1], SHARE),
        f"EP8, {5 * count} layers": Parameters(layers, SHARE, times=5),
        "full layer": Parameters([files], every),
        "full layer, TP2": Parameters([files], every, (1, 2)),
        "full layer, TP8": Parameters([files], every, (5, 8)),
        f"EP8 and TP2, {count} layers": Parameters(layers, SHARE, (1, 2)),
        f"EP8 and TP8, {count} layers": Parameters(layers, SHARE, (3, 8)),
    }
    sides = [params.side(name, loader) for name, params in sets.items()]
    return compare("Shares, memory-backed files", sides, arguments.repeats)


def memory(layers: list[LayerFiles], arguments: argparse.Namespace) -> dict[str, int]:
    params = Parameters(layers, SHARE)
    with MemoryWatch() as watch, ExpertLoader("cuda", arguments.options) as loader:
        params.load(loader)
        staging = loader.options.staging_nbytes
    figures = {
        "staging_nbytes": staging,
        "host_nbytes": watch.extra_host,
        "torch_nbytes": watch.extra_torch,
        "driver_nbytes": watch.extra_device,
    }
    print("\nextra memory of a load at its peak, MiB:", {name: value >> 20 for name, value in figures.items()})
    return figures


def cold(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    base = arguments.disk / "nvfp4-prep-bench"
    few = range(SHARE.start, SHARE.start + COLD_EXPERTS)
    files = write_layer(base / "full", 1, KIMI, few, torch.device("cuda"), original=base / "original")
    params = Parameters([files], few)
    ways = {"direct I/O": DirectIO.ALWAYS, "page cache": DirectIO.NEVER, "automatic": DirectIO.AUTO}
    loaders = {name: ExpertLoader("cuda", LoadOptions(direct_io=way)) for name, way in ways.items()}
    sides = [
        params.side(f"prepared, nvfp4_prep.load, {name}", loader, way="ours", direct_io=name)
        for name, loader in loaders.items()
    ]
    tp = Parameters([files], few, (3, 8))
    sides.append(tp.side("prepared, nvfp4_prep.load, TP8 share", loaders["automatic"], way="share"))
    sides += [side for side in original_sides([files], len(few)) if side.facts["loader"] != "Run:ai"]
    paths = [files.prepared, *([files.original] if files.original else [])]
    rows = compare("Cold disk, 24 experts of one layer", sides, arguments.cold_repeats, before=lambda: drop(paths))
    for loader in loaders.values():
        loader.close()
    for path in paths:
        path.unlink()
    return rows


def _order(point: tuple[int, float, int]) -> tuple[bool, float, int, int]:
    """4 MiB first, then the other sizes."""
    threads, chunk_mib, buffers = point
    return chunk_mib != 4, chunk_mib, threads, buffers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="memory-backed directory for 24 GB of files")
    parser.add_argument("--disk", type=Path, help="directory on a disk, for the cold figures")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--chunk-mib", type=float, default=LoadOptions().chunk_nbytes / 2**20)
    parser.add_argument("--buffers", type=int, default=LoadOptions().buffers)
    parser.add_argument("--sweep", default=SWEEP, help="threads,chunk MiB,buffers of each point")
    parser.add_argument("--sweep-only", action="store_true", help="leave the other tables out")
    parser.add_argument("--best", action="store_true", help="use the fastest point of the sweep for the other tables")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    points = [point.split(",") for point in arguments.sweep.split()]
    arguments.options = LoadOptions(arguments.threads, int(arguments.chunk_mib * 2**20), arguments.buffers)
    options = arguments.options
    own = (options.thread_count, options.chunk_nbytes / 2**20, options.buffer_count)
    arguments.sweep = sorted({own, *((int(t), float(c), int(b)) for t, c, b in points)}, key=_order)
    return arguments


if __name__ == "__main__":
    main()
