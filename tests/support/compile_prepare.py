"""Compiles the prepare kernels ahead of time at Kimi dimensions; run as a program, without the interpreter.

Prints one line a kernel: tensor, architecture, direction, number of data accesses narrower and as wide as 16 bytes.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_prep_kernels import MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels import triton_prepare_kernels as kernels
from nvfp4_prep_kernels.triton_prepare import index_map, plan_launch

LAYOUTS, DIMS = (MoeLayout.cutedsl(gated=True), MoeLayout.trtllm(gated=True)), MoeDims(384, 2048, 7168)


def compile_one(layout: MoeLayout, tensor: PreparedTensor, arch: int, inverse: bool, stacked: bool) -> tuple[int, int]:
    mapping = index_map(layout, tensor, DIMS)
    launch = plan_launch(mapping, tensor.is_scale, mapping.col_src, 16, inverse)
    kernel = kernels.scales if tensor.is_scale else kernels.codes
    signature = {"table": "*i64", "prepared": "*i32" if tensor.is_scale else "*i64", "dirty": "*i32"}
    signature |= dict.fromkeys(("base_0", "stride_0", "base_1", "stride_1"), "i64")
    constants = {"STACKED": stacked, **launch.constants}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps})
    accesses = re.findall(r"\b(ld|st)\.global((?:\.\w+)*)\b", compiled.asm["ptx"])
    wide = sum(kind.endswith((".v2.b64", ".v4.b32")) for _, kind in accesses)
    # the address table is read in single 8-byte words; stacked sources have none, so there all loads are of data
    data = [kind for op, kind in accesses if stacked or op == "st"]
    narrow = sum(not kind.endswith((".v2.b64", ".v4.b32")) for kind in data)
    return narrow, wide


if __name__ == "__main__":
    for layout, tensor, arch, inverse in itertools.product(LAYOUTS, PreparedTensor, (80, 90, 100), (False, True)):
        direction = "inverse" if inverse else "forward"
        # one kind of source for each direction and architecture is enough
        print(tensor.value, arch, direction, *compile_one(layout, tensor, arch, inverse, stacked=arch != 90))
