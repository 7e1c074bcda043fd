"""The preparation kernels at Kimi-K2.5 dimensions against the card's copy rate and against vLLM's own code.

    python benchmarks/bench_prepare_kernels.py --experts 96 --json out.json

Needs a CUDA GPU; vLLM's side needs vLLM installed, or four of its files (vllm_functions.py). Sides are interleaved;
minimum, median and maximum are printed. Rates count bytes read and written. Random bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm_functions import find_files, load_vllm_preparation

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, triton_prepare
from nvfp4_prep_kernels.triton_prepare import prepare, unprepare

_QUEUE_CYCLES = 4_000_000
"""About 2 ms of waiting on the card, so that a side's launches are queued before its first kernel starts: what is timed
is the card's work, on all sides alike."""
LAYOUT = MoeLayout.cutedsl(gated=True)
MUST_MOVE = (PreparedTensor.W13_WEIGHT, PreparedTensor.W13_WEIGHT_SCALE, PreparedTensor.W2_WEIGHT_SCALE)
"""Codes of w2 are in place already."""
COPY, OURS, THEIRS = "copy of the size of w13_weight", "prepare: what has to move", "vLLM's preparation"


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


@dataclass
class Layer:
    """Random experts on the card and their prepared tensors; ``sizes`` in bytes, prepared."""

    dims: MoeDims
    parts: dict[PreparedTensor, list[torch.Tensor]]
    outs: dict[PreparedTensor, torch.Tensor]
    sizes: dict[PreparedTensor, int]

    @classmethod
    def random(cls, experts: int) -> Layer:
        dims = MoeDims(experts, 2048, 7168)
        parts = {tensor: random_parts(tensor, dims) for tensor in PreparedTensor}
        outs = {tensor: prepare(LAYOUT, tensor, dims, *parts[tensor]) for tensor in PreparedTensor}
        sizes = {tensor: experts * LAYOUT.expert_nbytes(tensor, dims) for tensor in PreparedTensor}
        return cls(dims, parts, outs, sizes)

    def check(self) -> None:
        """Ends the program unless the bytes are the torch reference's, and turn back."""
        for tensor in PreparedTensor:
            same = torch.equal(self.outs[tensor][:4], LAYOUT.apply(tensor, *(part[:4] for part in self.parts[tensor])))
            back = unprepare(LAYOUT, tensor, self.outs[tensor], self.dims)
            same = same and all(torch.equal(a, b) for a, b in zip(back, self.parts[tensor], strict=True))
            print(f"bytes {tensor.value}: {'as the torch reference, and back' if same else 'DIFFERENT'}", flush=True)
            if not same:
                raise SystemExit(1)


@dataclass(frozen=True)
class Timed:
    """One side: what runs, the bytes it has to move (read and written), the name of the copy of its size."""

    run: Callable[[], Any]
    nbytes: int
    copy: str | None = None


def copies(layer: Layer) -> dict[str, Timed]:
    """Device-to-device copies, one of the size of each tensor."""
    source = layer.outs[PreparedTensor.W13_WEIGHT].view(-1)
    target = torch.empty_like(source)
    return {
        f"copy of the size of {tensor.value}": Timed(
            lambda size=size: target[:size].copy_(source[:size]),  # type: ignore[misc]
            2 * size,
        )
        for tensor, size in layer.sizes.items()
    }


def kernels(layer: Layer) -> dict[str, Timed]:
    """Each kernel, both ways, and everything that has to move."""
    sides: dict[str, Timed] = {}
    dims, parts, outs = layer.dims, layer.parts, layer.outs
    for tensor in PreparedTensor:
        nbytes, copy = 2 * layer.sizes[tensor], f"copy of the size of {tensor.value}"

        def forward(tensor: PreparedTensor = tensor) -> torch.Tensor:
            return prepare(LAYOUT, tensor, dims, *parts[tensor], out=outs[tensor])

        def back(tensor: PreparedTensor = tensor) -> Any:
            return unprepare(LAYOUT, tensor, outs[tensor], dims)

        sides[f"prepare {tensor.value}"] = Timed(forward, nbytes, copy)
        sides[f"inverse {tensor.value}"] = Timed(back, nbytes, copy)
    w13 = PreparedTensor.W13_WEIGHT
    listed = [list(part.clone()) for part in parts[w13]]
    sides["prepare w13_weight from one tensor an expert"] = Timed(
        lambda: prepare(LAYOUT, w13, dims, *listed, out=outs[w13]), 2 * layer.sizes[w13], f"copy of the size of {w13}"
    )
    sides[OURS] = Timed(
        lambda: [prepare(LAYOUT, tensor, dims, *parts[tensor]) for tensor in MUST_MOVE],
        2 * sum(layer.sizes[tensor] for tensor in MUST_MOVE),
    )
    return sides


def vllm_side(layer: Layer, folder: Path) -> Timed:
    """vLLM's own preparation of the same tensors; ends the program if its bytes are others."""
    theirs = load_vllm_preparation(folder)
    parts = layer.parts
    arguments = (
        torch.cat(parts[PreparedTensor.W13_WEIGHT], dim=1),
        torch.cat(parts[PreparedTensor.W13_WEIGHT_SCALE], dim=1).view(torch.float8_e4m3fn),
        parts[PreparedTensor.W2_WEIGHT][0],
        parts[PreparedTensor.W2_WEIGHT_SCALE][0].view(torch.float8_e4m3fn),
    )
    result = theirs(*arguments)
    pairs = zip((0, 1, 5), MUST_MOVE, strict=True)
    same = all(torch.equal(result[place].view(torch.uint8), layer.outs[tensor]) for place, tensor in pairs)
    print(f"bytes against vLLM: {'equal' if same else 'DIFFERENT'}", flush=True)
    if not same:
        raise SystemExit(1)
    return Timed(lambda: theirs(*arguments), 2 * sum(layer.sizes[tensor] for tensor in MUST_MOVE))


def bench(experts: int, repeats: int, vllm_files: Path | None) -> dict[str, Any]:
    """All figures."""
    layer = Layer.random(experts)
    layer.check()
    sides = copies(layer) | kernels(layer)
    if vllm_files is not None:
        sides[THEIRS] = vllm_side(layer, vllm_files)
    memory = {name: extra_nbytes(sides[name].run) for name in (OURS, THEIRS) if name in sides}
    found = times_ms({name: side.run for name, side in sides.items()}, repeats)
    rates = {name: side.nbytes / statistics.median(found[name]) / 1e9 for name, side in sides.items()}
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "experts": experts,
        "repetitions": repeats,
        "rows": {
            name: {
                "nbytes": side.nbytes,
                "ms": [min(found[name]), statistics.median(found[name]), max(found[name])],
                "tb_per_s": rates[name],
                "share_of_copy": rates[name] / rates[COPY],
                "share_of_copy_of_this_size": rates[name] / rates[side.copy] if side.copy else None,
            }
            for name, side in sides.items()
        },
        "memory": {name: {"peak_nbytes": peak, "result_nbytes": kept} for name, (peak, kept) in memory.items()},
    }


def tile_choices(tensor: PreparedTensor) -> list[dict[str, int]]:
    """Constants of triton_prepare to try."""
    if tensor.is_scale:
        return [
            {"SCALE_TILE_WORDS": words, "SCALE_WARPS": warps} for words in (8, 16, 32, 64) for warps in (1, 2, 4, 8)
        ]
    return [
        {"CODE_TILE_COLS": cols, "CODE_TILE_UNITS": units, "CODE_WARPS": warps}
        for cols in (32, 64, 128)
        for units in (1024, 2048, 4096, 8192)
        for warps in (4, 8)
    ]


def sweep(experts: int) -> None:
    """Rates for other tile sizes: where the constants of triton_prepare come from."""
    dims = MoeDims(experts, 2048, 7168)
    for tensor in PreparedTensor:
        parts = random_parts(tensor, dims)
        out = prepare(LAYOUT, tensor, dims, *parts)
        rates = []
        for choice in tile_choices(tensor):
            for name, value in choice.items():
                setattr(triton_prepare, name, value)
            found = times_ms({"x": lambda: prepare(LAYOUT, tensor, dims, *parts, out=out)}, 7)["x"]  # noqa: B023
            rates.append((2 * out.numel() / statistics.median(found) / 1e9, choice))
        for rate, choice in sorted(rates, key=lambda item: -item[0])[:6]:
            print(f"sweep {tensor.value}: {rate:.2f} TB/s with {choice}", flush=True)


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
    ours = result["rows"][OURS]["ms"][1]
    theirs = result["rows"].get(THEIRS)
    if theirs is not None:
        print(f"vLLM / ours: {theirs['ms'][1] / ours:.1f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--vllm-files", type=Path, default=find_files(), help="folder with vLLM's preparation code (default: installed)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    if arguments.sweep:
        sweep(arguments.experts)
        return
    result = bench(arguments.experts, arguments.repeats, arguments.vllm_files)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
