"""TRTLLM-gen's layout at Kimi-K2.5 dimensions: preparation and conversion from CuteDSL against the GPU's copy rate.

    python benchmarks/bench_trtllm_kernels.py --experts 96 --json out.json

Needs a CUDA GPU. vLLM's side needs four of its files and two of FlashInfer's (vllm_functions.py). FlashInfer's own
scale interleave needs its CUDA sources, nvcc and apache-tvm-ffi (flashinfer_cuda.py); without those our torch swizzle
takes its place, and the result says so. Sides are interleaved; minimum, median and maximum are printed. Rates count
bytes read and written. Random bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_prepare_kernels import Timed, random_parts, times_ms
from flashinfer_cuda import Function, load_flashinfer_shuffles, missing_for_build
from vllm_functions import find_files, find_flashinfer, load_vllm_trtllm_preparation

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor, triton_relayout
from nvfp4_prep_kernels.scale_swizzle import swizzle_scales
from nvfp4_prep_kernels.triton_prepare import prepare, unprepare
from nvfp4_prep_kernels.triton_relayout import relayout

TRTLLM, CUTEDSL = MoeLayout.trtllm(gated=True), MoeLayout.cutedsl(gated=True)
Tensors = dict[PreparedTensor, torch.Tensor]
OURS, THEIRS, PERMUTED = "prepare: all four tensors", "vLLM's preparation", "relayout in place: all four tensors"


def same(name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Ends the program unless all pairs are equal."""
    equal = all(torch.equal(left, right) for left, right in pairs)
    print(f"bytes, {name}: {'equal' if equal else 'DIFFERENT'}", flush=True)
    if not equal:
        raise SystemExit(1)


def check(parts: dict[PreparedTensor, list[torch.Tensor]], dims: MoeDims, made: Tensors, other: Tensors) -> None:
    """The kernels' bytes against torch's, both ways, and converted in place and out of place."""
    for tensor in PreparedTensor:
        expected = TRTLLM.apply(tensor, *(part[:4] for part in parts[tensor]))
        same(f"{tensor.value}, prepared", [(made[tensor][:4], expected)])
        back = unprepare(TRTLLM, tensor, made[tensor], dims)
        same(f"{tensor.value}, restored", list(zip(back, parts[tensor], strict=True)))
        same(f"{tensor.value}, converted", [(relayout(tensor, other[tensor], CUTEDSL, TRTLLM), made[tensor])])
        memory = other[tensor].clone()
        relayout(tensor, memory, CUTEDSL, TRTLLM, out=memory)
        same(f"{tensor.value}, converted in place", [(memory, made[tensor])])
        relayout(tensor, memory, TRTLLM, CUTEDSL, out=memory)
        same(f"{tensor.value}, and back", [(memory, other[tensor])])


def sides_of(
    parts: dict[PreparedTensor, list[torch.Tensor]], dims: MoeDims, made: Tensors, other: Tensors
) -> dict[str, Timed]:
    """Copies, preparation, its inverse and conversion of each tensor, and of all four."""
    sides: dict[str, Timed] = {}
    scratch = {tensor: value.clone() for tensor, value in other.items()}

    def add(name: str, tensor: PreparedTensor, run: Callable[[PreparedTensor], Any]) -> None:
        copy = None if name == "copy" else f"copy {tensor.value}"
        sides[f"{name} {tensor.value}"] = Timed(lambda: run(tensor), 2 * made[tensor].numel(), copy)

    for tensor in PreparedTensor:
        add("copy", tensor, lambda tensor: scratch[tensor].copy_(other[tensor]))
        add("prepare", tensor, lambda tensor: prepare(TRTLLM, tensor, dims, *parts[tensor], out=made[tensor]))
        add("inverse", tensor, lambda tensor: unprepare(TRTLLM, tensor, made[tensor], dims))
        add("relayout", tensor, lambda tensor: relayout(tensor, other[tensor], CUTEDSL, TRTLLM, out=scratch[tensor]))
        # forth and back by turns would time two kernels: the bytes do not matter here, they were checked before
        add("in place", tensor, lambda tensor: relayout(tensor, scratch[tensor], CUTEDSL, TRTLLM, out=scratch[tensor]))
    nbytes = 2 * sum(tensor.numel() for tensor in made.values())
    sides["copy of all four tensors"] = Timed(
        lambda: [scratch[tensor].copy_(other[tensor]) for tensor in PreparedTensor], nbytes
    )
    sides[OURS] = Timed(
        lambda: [prepare(TRTLLM, tensor, dims, *parts[tensor], out=made[tensor]) for tensor in PreparedTensor],
        nbytes,
        "copy of all four tensors",
    )
    sides[PERMUTED] = Timed(
        lambda: [relayout(tensor, scratch[tensor], CUTEDSL, TRTLLM, out=scratch[tensor]) for tensor in PreparedTensor],
        nbytes,
        "copy of all four tensors",
    )
    return sides


def check_flashinfer(
    parts: dict[PreparedTensor, list[torch.Tensor]], made: Tensors, functions: dict[str, Function], experts: int = 4
) -> None:
    """FlashInfer's own shuffles and interleave, run on this GPU, against the kernels' bytes."""
    for tensor in PreparedTensor:
        for expert in range(experts):
            # its order of the steps: up before gate, their rows in turn, then the shuffle of each 128 rows
            rows = torch.cat([part[expert] for part in reversed(parts[tensor])])
            if tensor.is_w13:
                rows = rows[functions["reorder_rows"](rows).to(rows.device)]
            shuffle = functions["shuffle_matrix_sf_a" if tensor.is_scale else "shuffle_matrix_a"]
            same(
                f"{tensor.value}[{expert}] against FlashInfer",
                [(shuffle(rows, 128).flatten(), made[tensor][expert].flatten())],
            )
        if tensor.is_scale and not tensor.is_w13:
            plain = parts[tensor][0][:experts].contiguous()
            ours = swizzle_scales(plain).flatten()
            same("block_scale_interleave, 3-D", [(functions["block_scale_interleave"](plain), ours)])


def vllm_side(
    parts: dict[PreparedTensor, list[torch.Tensor]],
    dims: MoeDims,
    made: Tensors,
    folders: tuple[Path, Path],
    interleave: Function | None,
) -> Timed:
    """vLLM's own preparation of the same tensors; ends the program if its bytes are others."""
    theirs = load_vllm_trtllm_preparation(*folders, interleave)
    # vLLM's order of the steps: [gate; up] becomes [up; gate], then the function shuffles
    arguments = (
        torch.cat(parts[PreparedTensor.W13_WEIGHT], dim=1),
        torch.cat(parts[PreparedTensor.W13_WEIGHT_SCALE], dim=1).view(torch.float8_e4m3fn),
        parts[PreparedTensor.W2_WEIGHT][0],
        parts[PreparedTensor.W2_WEIGHT_SCALE][0].view(torch.float8_e4m3fn),
    )
    found = theirs(*arguments)
    pairs = [(value.view(torch.uint8), made[tensor]) for value, tensor in zip(found, PreparedTensor, strict=True)]
    same("against vLLM", pairs)
    return Timed(lambda: theirs(*arguments), 2 * sum(tensor.numel() for tensor in made.values()))


def bench(experts: int, repeats: int, folders: tuple[Path, Path] | None) -> dict[str, Any]:
    """All figures."""
    dims = MoeDims(experts, 2048, 7168)
    parts = {tensor: random_parts(tensor, dims) for tensor in PreparedTensor}
    made, other = (
        {tensor: prepare(layout, tensor, dims, *parts[tensor]) for tensor in PreparedTensor}
        for layout in (TRTLLM, CUTEDSL)
    )
    check(parts, dims, made, other)
    sides = sides_of(parts, dims, made, other)
    lacking = "vLLM's and FlashInfer's files" if folders is None else missing_for_build(folders[1])
    with tempfile.TemporaryDirectory(prefix="flashinfer-") as build:
        functions = {} if folders is None or lacking else load_flashinfer_shuffles(folders[1], Path(build))
        if functions:
            check_flashinfer(parts, made, functions)
        if folders is not None:
            sides[THEIRS] = vllm_side(parts, dims, made, folders, functions.get("block_scale_interleave"))
    found = times_ms({name: side.run for name, side in sides.items()}, repeats)
    rates = {name: side.nbytes / statistics.median(found[name]) / 1e9 for name, side in sides.items()}
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "experts": experts,
        "repetitions": repeats,
        "vllm": "its real functions"
        + (
            f"; our torch swizzle for FlashInfer's interleave, {lacking} is missing"
            if lacking
            else ", FlashInfer's too"
        ),
        "rows": {
            name: {
                "nbytes": side.nbytes,
                "ms": [min(found[name]), statistics.median(found[name]), max(found[name])],
                "tb_per_s": rates[name],
                "share_of_copy_of_this_size": rates[name] / rates[side.copy] if side.copy else None,
            }
            for name, side in sides.items()
        },
    }


def sweep(experts: int) -> None:
    """Rates of conversion in place for other tile sizes: where triton_relayout's constants come from."""
    dims = MoeDims(experts, 2048, 7168)
    for tensor in (PreparedTensor.W13_WEIGHT, PreparedTensor.W2_WEIGHT, PreparedTensor.W13_WEIGHT_SCALE):
        memory = prepare(CUTEDSL, tensor, dims, *random_parts(tensor, dims))
        names = ("ATOMS", "SCALE_WARPS") if tensor.is_scale else ("CODE_UNITS", "CODE_WARPS")
        rates = []
        for size in (2, 4, 8, 16, 32, 64):
            for warps in (1, 2, 4, 8):
                for name, value in zip(names, (size, warps), strict=True):
                    setattr(triton_relayout, name, value)
                run = lambda: relayout(tensor, memory, CUTEDSL, TRTLLM, out=memory)  # noqa: B023, E731
                rates.append((2 * memory.numel() / statistics.median(times_ms({"x": run}, 7)["x"]) / 1e9, size, warps))
        for rate, size, warps in sorted(rates, reverse=True)[:5]:
            print(f"sweep {tensor.value}: {rate:.2f} TB/s with {names[0]} {size}, {warps} warps", flush=True)


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"{result['card']}, torch {result['torch']}, {result['experts']} experts of Kimi-K2.5")
    print(f"{'':40} {'GB':>7} {'min':>8} {'median':>8} {'max':>8} ms {'TB/s':>6} {'of copy':>8}")
    for name, row in result["rows"].items():
        low, middle, high = row["ms"]
        print(
            f"{name:40} {row['nbytes'] / 1e9:7.2f} {low:8.3f} {middle:8.3f} {high:8.3f}    {row['tb_per_s']:6.2f}"
            f" {row['share_of_copy_of_this_size'] or 0:8.1%}"
        )
    if THEIRS in result["rows"]:
        print(f"vLLM / ours: {result['rows'][THEIRS]['ms'][1] / result['rows'][OURS]['ms'][1]:.1f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--vllm-files", type=Path, default=find_files(), help="folder with vLLM's preparation code")
    parser.add_argument(
        "--flashinfer-files", type=Path, default=find_flashinfer(), help="FlashInfer's package folder, or part of it"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    if arguments.sweep:
        sweep(arguments.experts)
        return
    folders = (arguments.vllm_files, arguments.flashinfer_files)
    result = bench(arguments.experts, arguments.repeats, folders if all(folders) else None)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
