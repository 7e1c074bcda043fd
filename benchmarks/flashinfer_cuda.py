"""FlashInfer's CUDA scale interleave and its shuffle functions, built and run without the package.

``import flashinfer`` needs libraries that a benchmark machine may lack (CUTLASS DSL, cuDNN). Its NVFP4 module is seven
source files: they are compiled as FlashInfer's own build does, and the Python functions around them are executed from
FlashInfer's source text.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm_functions import load_flashinfer_indices

__all__ = ["load_flashinfer_shuffles", "missing_for_build"]

_SOURCES = (
    "nv_internal/tensorrt_llm/thop/fp4Quantize.cpp",
    "nv_internal/tensorrt_llm/thop/fp4Op.cpp",
    "nv_internal/cpp/kernels/quantization.cu",
    "nv_internal/cpp/common/envUtils.cpp",
    "nv_internal/cpp/common/logger.cpp",
    "nv_internal/cpp/common/stringUtils.cpp",
    "nv_internal/cpp/common/tllmException.cpp",
)
_INCLUDES = ("csrc", "csrc/nv_internal", "csrc/nv_internal/include", "include", "cutlass/include", "spdlog/include")
_FUNCTIONS = ("shuffle_matrix_a", "shuffle_matrix_sf_a", "_compute_swizzled_layout_sf_size")
Function = Callable[..., torch.Tensor]


def missing_for_build(flashinfer: Path) -> str:
    """Return what this machine lacks to build FlashInfer's module; empty if nothing."""
    if shutil.which("nvcc") is None:
        return "nvcc"
    try:
        import tvm_ffi  # noqa: F401
    except ImportError:
        return "the package apache-tvm-ffi"
    missing = [name for name in _SOURCES if not (flashinfer / "data/csrc" / name).is_file()]
    return f"FlashInfer's sources ({missing[0]})" if missing else ""


def load_flashinfer_shuffles(flashinfer: Path, build: Path) -> dict[str, Function]:
    """Build and return FlashInfer's functions.

    Args:
        flashinfer: FlashInfer's folder, with ``data/`` in it.
        build: an empty folder for what is compiled.

    Returns:
        ``block_scale_interleave``, ``shuffle_matrix_a`` and ``shuffle_matrix_sf_a`` for CUDA tensors, and
        ``reorder_rows``, the row indices for gated experts.

    Raises:
        subprocess.CalledProcessError: if the compiler fails.
    """
    import tvm_ffi

    module: Any = tvm_ffi.load_module(str(_build(flashinfer, build)))
    names: dict[str, Any] = {"torch": torch, **load_flashinfer_indices(flashinfer)}
    tree = ast.parse((flashinfer / "quantization/fp4_quantization.py").read_text())
    helpers = ast.parse((flashinfer / "utils.py").read_text())
    for node in [*helpers.body, *tree.body]:
        if isinstance(node, ast.FunctionDef) and node.name in (*_FUNCTIONS, "ceil_div", "round_up"):
            node.decorator_list = []
            exec(compile(ast.Module([node], []), node.name, "exec"), names)

    def block_scale_interleave(scales: torch.Tensor) -> torch.Tensor:
        experts = scales.shape[0] if scales.dim() == 3 else 1
        size = names["_compute_swizzled_layout_sf_size"](scales.shape[-2], scales.shape[-1], 128)
        out = torch.empty(experts * size, dtype=scales.dtype, device=scales.device)
        module.block_scale_interleave_sm100(scales, out)
        return out

    names["block_scale_interleave"] = block_scale_interleave
    return {
        "block_scale_interleave": block_scale_interleave,
        "shuffle_matrix_a": names["shuffle_matrix_a"],
        "shuffle_matrix_sf_a": names["shuffle_matrix_sf_a"],
        "reorder_rows": names["get_reorder_rows_for_gated_act_gemm_row_indices"],
    }


def _build(flashinfer: Path, build: Path) -> Path:
    from tvm_ffi import libinfo

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a" if major >= 9 else f"{major}{minor}"
    library = Path(str(libinfo.find_libtvm_ffi()))
    includes = [str(flashinfer / "data" / name) for name in _INCLUDES]
    includes += [str(libinfo.find_include_path()), str(libinfo.find_dlpack_include_path())]
    flags = [
        "-std=c++17",
        "-O3",
        "--compiler-options=-fPIC",
        "--expt-relaxed-constexpr",
        "-static-global-template-stub=false",
    ]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-DENABLE_BF16", "-DENABLE_FP8", "-DENABLE_FP4"]
    flags += [f"-I{include}" for include in includes]
    objects, running = [], []
    for number, name in enumerate(_SOURCES):
        objects.append(str(build / f"{number}.o"))
        source = str(flashinfer / "data/csrc" / name)
        running.append(subprocess.Popen(["nvcc", *flags, "-c", source, "-o", objects[-1]]))
    for process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    made = build / "fp4_quantization.so"
    link = ["nvcc", "-shared", *objects, f"-L{library.parent}", "-ltvm_ffi", "-lcuda", "-o", str(made)]
    subprocess.run([*link, "-Xlinker", f"-rpath={library.parent}"], check=True)
    return made
