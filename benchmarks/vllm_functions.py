"""Loads vLLM's own NVFP4 preparation without installing vLLM.

The four files that hold it are executed as they are; every other module of vLLM that they import is a stand-in,
because none of it takes part in preparing weights. So the functions can be timed on a machine where vLLM's
compiled parts do not fit.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

__all__ = ["FILES", "find_files", "load_vllm_preparation"]

_UTILS = "vllm.model_executor.layers.quantization.utils"
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
