"""The preparation kernels at Kimi-K2.5 dimensions against the card's copy rate and against vLLM's own code.

    PYTHONPATH=kernels python benchmarks/bench_prepare_kernels.py --experts 96 --vllm-files DIR --json out.json

Needs a CUDA card. Sides are interleaved; minimum, median and maximum are printed. Rates count bytes read and
written. Random bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm_functions import load_vllm_preparation

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, triton_prepare
from nvfp4_prep_kernels.triton_prepare import prepare, unprepare

_QUEUE_CYCLES = 4_000_000
"""About 2 ms of waiting on the card, so that a side's launches are queued before its first kernel starts: what is timed
is the card's work, on all sides alike."""
LAYOUT = MoeLayout.cutedsl(gated=True)


def random_parts(tensor: PreparedTensor, dims: MoeDims) -> list[torch.Tensor]:
    """Stacked projections; gate and up are halves of one tensor, as vLLM's loader leaves them."""
    rows, cols = LAYOUT.source_shape(tensor, dims)
    count = len(LAYOUT.projections(tensor))
    # no byte is NaN as e4m3: vLLM sees the scales as numbers
    fused = torch.randint(0, 0x7F, (dims.experts, count * rows, cols), dtype=torch.uint8, device="cuda")
    return list(fused.chunk(count, dim=1))


def times_ms(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each side, interleaved, after one warm-up each."""
    for run in sides.values():
        run()
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_QUEUE_CYCLES)
            start.record()
            result = run()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end))
            del result
    return found


def extra_nbytes(run: Callable[[], Any]) -> tuple[int, int]:
    """``(peak above the state before, bytes of what was returned)``."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    kept = torch.cuda.memory_allocated() - before
    del result
    return peak, kept


def bench(experts: int, repeats: int, vllm_files: Path | None) -> dict[str, Any]:
    """All figures."""
    dims = MoeDims(experts, 2048, 7168)
    parts = {tensor: random_parts(tensor, dims) for tensor in PreparedTensor}
    sizes = {tensor: experts * LAYOUT.expert_nbytes(tensor, dims) for tensor in PreparedTensor}
    outs = {tensor: prepare(LAYOUT, tensor, dims, *parts[tensor]) for tensor in PreparedTensor}
    for tensor in PreparedTensor:
        reference = LAYOUT.apply(tensor, *(part[:4] for part in parts[tensor]))
        same = torch.equal(outs[tensor][:4], reference)
        back = unprepare(LAYOUT, tensor, outs[tensor], dims)
        same = same and all(torch.equal(a, b) for a, b in zip(back, parts[tensor], strict=True))
        print(f"bytes {tensor.value}: {'equal to the torch reference, and back' if same else 'DIFFERENT'}", flush=True)
        if not same:
            raise SystemExit(1)
        del back
    copy_to = torch.empty_like(outs[PreparedTensor.W13_WEIGHT])
    sides: dict[str, Callable[[], Any]] = {"copy": lambda: copy_to.copy_(outs[PreparedTensor.W13_WEIGHT])}
    moved = {"copy": 2 * sizes[PreparedTensor.W13_WEIGHT]}
    for tensor in list(PreparedTensor)[1:]:
        whole, size = outs[PreparedTensor.W13_WEIGHT].view(-1), sizes[tensor]
        sides[f"copy of the size of {tensor.value}"] = lambda whole=whole, size=size: copy_to.view(-1)[:size].copy_(
            whole[:size]
        )  # type: ignore[misc]
        moved[f"copy of the size of {tensor.value}"] = 2 * size
    for tensor in PreparedTensor:
        sides[f"prepare {tensor.value}"] = lambda tensor=tensor: prepare(  # type: ignore[misc]
            LAYOUT, tensor, dims, *parts[tensor], out=outs[tensor]
        )
        sides[f"inverse {tensor.value}"] = lambda tensor=tensor: unprepare(LAYOUT, tensor, outs[tensor], dims)  # type: ignore[misc]
        moved |= dict.fromkeys((f"prepare {tensor.value}", f"inverse {tensor.value}"), 2 * sizes[tensor])
    listed = [list(part.clone()) for part in parts[PreparedTensor.W13_WEIGHT]]
    name = "prepare w13_weight from one tensor an expert"
    sides[name] = lambda: prepare(LAYOUT, PreparedTensor.W13_WEIGHT, dims, *listed, out=outs[PreparedTensor.W13_WEIGHT])
    moved[name] = moved["prepare w13_weight"]
    must_move = [PreparedTensor.W13_WEIGHT, PreparedTensor.W13_WEIGHT_SCALE, PreparedTensor.W2_WEIGHT_SCALE]

    def ours() -> list[torch.Tensor]:
        return [prepare(LAYOUT, tensor, dims, *parts[tensor]) for tensor in must_move]

    sides["prepare: what has to move"] = ours
    moved["prepare: what has to move"] = 2 * sum(sizes[tensor] for tensor in must_move)
    if vllm_files is not None:
        theirs = load_vllm_preparation(vllm_files)
        arguments = (
            torch.cat(parts[PreparedTensor.W13_WEIGHT], dim=1),
            torch.cat(parts[PreparedTensor.W13_WEIGHT_SCALE], dim=1).view(torch.float8_e4m3fn),
            parts[PreparedTensor.W2_WEIGHT][0],
            parts[PreparedTensor.W2_WEIGHT_SCALE][0].view(torch.float8_e4m3fn),
        )
        result = theirs(*arguments)
        pairs = zip((0, 1, 5), must_move, strict=True)
        same = all(torch.equal(result[place].view(torch.uint8), outs[tensor]) for place, tensor in pairs)
        print(f"bytes against vLLM: {'equal' if same else 'DIFFERENT'}", flush=True)
        del result
        sides["vLLM's preparation"] = lambda: theirs(*arguments)
        moved["vLLM's preparation"] = moved["prepare: what has to move"]
    memory = {name: extra_nbytes(sides[name]) for name in list(sides)[-2:]}
    found = times_ms(sides, repeats)
    rates = {name: moved[name] / statistics.median(found[name]) / 1e9 for name in sides}
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "experts": experts,
        "rows": {
            name: {
                "nbytes": moved[name],
                "ms": [min(found[name]), statistics.median(found[name]), max(found[name])],
                "tb_per_s": rates[name],
                "share_of_copy": rates[name] / rates["copy"],
                "share_of_copy_of_this_size": rates[name]
                / rates.get(f"copy of the size of {name.split()[1]}", rates["copy"])
                if name.split()[0] in ("prepare", "inverse")
                else None,
            }
            for name in sides
        },
        "memory": {name: {"peak_nbytes": peak, "result_nbytes": kept} for name, (peak, kept) in memory.items()},
    }


def sweep(experts: int) -> None:
    """Rates for other tile sizes: where the constants of triton_prepare come from."""
    dims = MoeDims(experts, 2048, 7168)
    for tensor in PreparedTensor:
        parts = random_parts(tensor, dims)
        out = prepare(LAYOUT, tensor, dims, *parts)
        nbytes = 2 * out.numel()
        if tensor.is_scale:
            choices = [(words, 0, warps) for words in (8, 16, 32, 64) for warps in (1, 2, 4, 8)]
        else:
            choices = [
                (c, units, warps) for c in (32, 64, 128) for units in (1024, 2048, 4096, 8192) for warps in (4, 8)
            ]
        rates = []
        for first, units, warps in choices:
            if tensor.is_scale:
                triton_prepare.SCALE_TILE_WORDS, triton_prepare.SCALE_WARPS = first, warps
            else:
                triton_prepare.CODE_TILE_COLS, triton_prepare.CODE_TILE_UNITS = first, units
                triton_prepare.CODE_WARPS = warps
            found = times_ms({"x": lambda: prepare(LAYOUT, tensor, dims, *parts, out=out)}, 7)["x"]  # noqa: B023
            rates.append((nbytes / statistics.median(found) / 1e9, first, units, warps))
        for rate, first, units, warps in sorted(rates, reverse=True)[:6]:
            print(
                f"sweep {tensor.value}: {rate:.2f} TB/s with {first} columns, {units} units, {warps} warps", flush=True
            )


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"{result['card']}, torch {result['torch']}, {result['experts']} experts of Kimi-K2.5")
    print(f"{'':48} {'GB':>7} {'min':>8} {'median':>8} {'max':>8} ms {'TB/s':>6} {'of copy':>8} {'of its size':>12}")
    for name, row in result["rows"].items():
        low, middle, high = row["ms"]
        print(
            f"{name:48} {row['nbytes'] / 1e9:7.2f} {low:8.3f} {middle:8.3f} {high:8.3f}    {row['tb_per_s']:6.2f}"
            f" {row['share_of_copy']:8.1%} {row['share_of_copy_of_this_size'] or 0:12.1%}"
        )
    for name, row in result["memory"].items():
        print(f"memory, {name}: peak {row['peak_nbytes'] / 1e9:.3f} GB, result {row['result_nbytes'] / 1e9:.3f} GB")
    ours = result["rows"]["prepare: what has to move"]["ms"][1]
    theirs = result["rows"].get("vLLM's preparation")
    if theirs is not None:
        print(f"vLLM / ours: {theirs['ms'][1] / ours:.1f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--vllm-files", type=Path, help="folder with vLLM's preparation code, see vllm_functions.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA card")
    if arguments.sweep:
        sweep(arguments.experts)
        return
    result = bench(arguments.experts, arguments.repeats, arguments.vllm_files)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
