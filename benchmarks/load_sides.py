"""The sides of the load benchmark: this package's loader, other loaders on original and prepared files, the bus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI, PREFIX, LayerFiles
from load_rivals import Tensors, available, vllm_preparation
from measuring import Side

from nvfp4_prep.load import ExpertLoader, LoadReport
from nvfp4_prep_kernels import MoeLayout, PreparedTensor, rank_slice

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

    def side(self, name: str, loader: ExpertLoader, **facts: Any) -> Side:
        return Side(name, self.nbytes, lambda: self.load(loader), facts)


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

    return Side("pinned copy of as many bytes", nbytes, run, {"way": "pinned"})


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

    label = "vLLM's preparation" if prepare is not None else "no preparation"
    return [
        Side(
            f"original, {name} {version}, {label}",
            nbytes,
            lambda read=read: load(read),
            {"way": "original", "loader": name, "vllm_preparation": prepare is not None},
        )
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
    """Where each tensor of the original file belongs."""
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


def prepared_sides(layers: list[LayerFiles], experts: int) -> tuple[list[Side], Parameters]:
    """The prepared files through the same libraries: tensors straight into the final parameters."""
    params = Parameters(layers, range(experts))
    places = {job[1].name: job[3] for job in params.jobs}
    paths = [files.prepared for files in layers]

    def load(read: Callable[[list[Path]], Tensors]) -> None:
        for name, tensor in read(paths):
            places[name].copy_(tensor.view(torch.uint8))

    sides = [
        Side(
            f"prepared, {name} {version}",
            params.nbytes,
            lambda read=read: load(read),
            {"way": "prepared", "loader": name},
        )
        for name, (version, read) in available().items()
    ]
    return sides, params
