"""Loading a layer for the kernel of the file against loading it for the other kernel, rearranged on the GPU.

    python benchmarks/bench_relayout_load.py --directory /dev/shm --json out.json

One layer at Kimi-K2.5 dimensions (random bytes, files in memory) is loaded by this package's loader into parameters
on the GPU; the other side then rearranges them in place, as the plugins for vLLM and SGLang do. Sides are interleaved;
minimum, median and maximum are printed. The rearranged bytes are compared with the prepare kernel's before timing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI, write_layer
from load_sides import LAYOUT, Parameters
from measuring import Side, compare

from nvfp4_prep.load import ExpertLoader, LoadReport
from nvfp4_prep.serving.relayout_at_load import RelayoutAtLoad
from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.triton_prepare import prepare, unprepare

TRTLLM = MoeLayout.trtllm(gated=True)
SAME, OTHER = "the file's kernel", "the other kernel, rearranged after loading"


class Layer(torch.nn.Module):
    """The four big parameters of a layer, by their names."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        for tensor, (*_, data) in zip(PreparedTensor, parameters.jobs, strict=True):
            setattr(self, tensor.value, torch.nn.Parameter(data, requires_grad=False))


def check(parameters: Parameters, layer: Layer, move: RelayoutAtLoad, loader: ExpertLoader) -> None:
    """End the program unless loading and rearranging gives what preparing for the other kernel gives."""
    parameters.load(loader)
    expected = {}
    for tensor in PreparedTensor:
        stored = getattr(layer, tensor.value).data[:2]
        parts = unprepare(LAYOUT, tensor, stored, MoeDims(2, move.dims.intermediate, move.dims.hidden))
        expected[tensor] = prepare(TRTLLM, tensor, MoeDims(2, move.dims.intermediate, move.dims.hidden), *parts)
    move.convert(layer)
    for tensor, wanted in expected.items():
        if not torch.equal(getattr(layer, tensor.value).data[:2].flatten(), wanted.flatten()):
            raise SystemExit(f"bytes, {tensor.value}: DIFFERENT")
    print("bytes: equal", flush=True)


def bench(directory: Path, experts: int, repeats: int) -> dict[str, Any]:
    """All figures."""
    dims = MoeDims(experts, KIMI.intermediate, KIMI.hidden)
    files = write_layer(directory, 1, dims, range(experts), torch.device("cuda"))
    parameters = Parameters([files], range(experts))
    layer, move = Layer(parameters), RelayoutAtLoad.of_share(LAYOUT, TRTLLM, dims, 1)
    with ExpertLoader("cuda") as loader:
        check(parameters, layer, move, loader)

        def other() -> LoadReport:
            report = parameters.load(loader)
            move.convert(layer)
            return report

        sides = [parameters.side(SAME, loader), Side(OTHER, parameters.nbytes, other)]
        rows = compare(f"one layer, {experts} experts", sides, repeats)
    ratio = rows[1]["median"] / rows[0]["median"]
    print(f"\nother / same: {ratio:.3f}")
    return {"experts": experts, "repetitions": repeats, "rows": rows, "other_over_same": ratio}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="in memory; a folder is made there and removed")
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(dir=arguments.directory, prefix="nvfp4-prep-relayout-"))
    try:
        result = bench(base, arguments.experts, arguments.repeats)
    finally:
        shutil.rmtree(base)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
