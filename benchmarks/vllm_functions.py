"""Loads vLLM's own NVFP4 preparation without installing vLLM.

The four files that hold it are executed as they are; every other module of vLLM that they import is a stand-in,
because none of it takes part in preparing weights. So the functions can be timed on a machine where vLLM's
compiled parts do not fit.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Optional, Union
from unittest.mock import MagicMock

import torch

from nvfp4_prep_kernels.scale_swizzle import swizzle_scales

__all__ = [
    "FILES",
    "FLASHINFER_FILES",
    "find_files",
    "find_flashinfer",
    "load_flashinfer_indices",
    "load_vllm_preparation",
    "load_vllm_trtllm_preparation",
]

_UTILS = "vllm.model_executor.layers.quantization.utils"
FLASHINFER_FILES = {
    "utils.py": (
        "get_shuffle_block_size",
        "get_shuffle_matrix_a_row_indices",
        "get_shuffle_matrix_sf_a_row_indices",
    ),
    "fused_moe/core.py": (
        "get_reorder_rows_for_gated_act_gemm_row_indices",
        "_maybe_get_cached_w3_w1_permute_indices",
        "get_w2_permute_indices_with_cache",
    ),
}
"""FlashInfer's files that are read, and the functions of them that are executed."""
FILES = ("flashinfer_fp4_moe.py", "flashinfer_utils.py", "nvfp4_utils.py", "quant_utils.py")


class _StandIn(types.ModuleType):
    """A module in which every name exists and does nothing."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "round_up":
            return lambda value, multiple: -(-value // multiple) * multiple
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.split(".")[0] != "vllm":
            return None
        package, _, name = fullname.rpartition(".")
        if package == _UTILS and f"{name}.py" in FILES:
            return importlib.util.spec_from_file_location(fullname, self._folder / f"{name}.py")
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """A stand-in needs no execution."""


def find_files() -> Path | None:
    """The folder of the files in an installed vLLM, which is not imported for that."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent.joinpath(*_UTILS.split(".")[1:])
    return folder if all((folder / name).is_file() for name in FILES) else None


def load_vllm_preparation(folder: Path) -> Callable[..., tuple[torch.Tensor, ...]]:
    """vLLM's ``prepare_nvfp4_moe_layer_for_flashinfer_cutedsl`` for gated SiLU experts.

    Args:
        folder: where the files of :data:`FILES` lie, from ``vllm/model_executor/layers/quantization/utils``.

    Returns:
        A function of (w13, w13 scales, w2, w2 scales), stacked ``uint8`` and ``float8_e4m3fn``.
    """
    sys.meta_path.insert(0, _Finder(folder))
    prepare = importlib.import_module(f"{_UTILS}.flashinfer_fp4_moe").prepare_nvfp4_moe_layer_for_flashinfer_cutedsl

    def run(
        w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        parallel = types.SimpleNamespace(enable_eplb=False)
        config = types.SimpleNamespace(
            moe_parallel_config=parallel,
            intermediate_size_per_partition=w2.shape[2] * 2,
            hidden_dim=w2.shape[1],
            hidden_dim_unpadded=None,
        )
        layer = types.SimpleNamespace(moe_config=config, activation=types.SimpleNamespace(is_gated=True))
        ones = torch.ones(w13.shape[0], device=w13.device)
        result: tuple[torch.Tensor, ...] = prepare(layer, w13, w13_scale, ones, ones, w2, w2_scale, ones, ones)
        return result

    return run


def find_flashinfer() -> Path | None:
    """The folder of an installed FlashInfer, which is not imported for that."""
    spec = importlib.util.find_spec("flashinfer")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def load_flashinfer_indices(folder: Path) -> dict[str, Callable[..., torch.Tensor]]:
    """FlashInfer's index functions alone, from its source text: importing the package needs a GPU's libraries."""
    names: dict[str, Any] = {"torch": torch, "Union": Union, "Optional": Optional}
    for file, wanted in FLASHINFER_FILES.items():
        module = ast.parse((folder / file).read_text())
        for node in module.body:
            constant = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                node.decorator_list = []
            elif not (constant and node.targets[0].id.startswith("srcToDst")):  # type: ignore[attr-defined]
                continue
            exec(compile(ast.Module([node], []), str(folder / file), "exec"), names)
    return {name: names[name] for wanted in FLASHINFER_FILES.values() for name in wanted}


def load_vllm_trtllm_preparation(
    vllm: Path, flashinfer: Path, interleave: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """vLLM's preparation for TRTLLM-gen: ``reorder_w1w3_to_w3w1`` and ``prepare_static_weights_for_trtllm_fp4_moe``.

    FlashInfer's index functions are its own.

    Args:
        vllm: where the files of :data:`FILES` lie.
        flashinfer: FlashInfer's folder, with the files of :data:`FLASHINFER_FILES`.
        interleave: FlashInfer's ``nvfp4_block_scale_interleave``, which is CUDA code (flashinfer_cuda.py); this
            project's torch swizzle if left out.

    Returns:
        A function of (w13, w13 scales, w2, w2 scales), stacked ``uint8`` and ``float8_e4m3fn``, of gated experts
        without padding; its results are in the order of the arguments.
    """
    package, core = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.fused_moe.core")
    vars(package)["nvfp4_block_scale_interleave"] = interleave or (lambda scales: swizzle_scales(scales).flatten())
    vars(core).update(load_flashinfer_indices(flashinfer))
    sys.modules |= {
        "flashinfer": package,
        "flashinfer.fused_moe": types.ModuleType("flashinfer.fused_moe"),
        "flashinfer.fused_moe.core": core,
    }
    sys.meta_path.insert(0, _Finder(vllm))
    module = importlib.import_module(f"{_UTILS}.flashinfer_fp4_moe")

    def run(
        w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        w13, w13_scale = module.reorder_w1w3_to_w3w1(w13, w13_scale)
        experts, hidden, inter = w2.shape[0], w2.shape[1], w2.shape[2] * 2
        made = module.prepare_static_weights_for_trtllm_fp4_moe(
            w13, w2, w13_scale, w2_scale, hidden, inter, experts, True
        )
        return made[0], made[1], made[2], made[3]

    return run
