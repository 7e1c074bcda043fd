"""Other ways to bring experts from safetensors files into parameters on a GPU, for comparison with the loader.

Each is used as its documentation and vLLM use it. Names are resolved before the clock starts and nothing but a copy is
done for each tensor, so what vLLM itself spends on every tensor is not in these figures.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

Tensors = Iterator[tuple[str, torch.Tensor]]


def by_safetensors(files: list[Path]) -> Tensors:
    for file in files:
        with safe_open(file, framework="pt", device="cuda:0") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def by_fastsafetensors(files: list[Path]) -> Tensors:
    parallel = importlib.import_module("fastsafetensors.parallel_loader")
    group = importlib.import_module("fastsafetensors").SingleGroup()
    loader = parallel.ParallelLoader(
        pg=group,
        hf_weights_files=[str(file) for file in files],
        queue_size=0,
        use_tqdm_on_load=False,
        device="cuda:0",
        nogds=True,
    )
    try:
        yield from loader.iterate_weights()
    finally:
        loader.close()


def by_instanttensor(files: list[Path]) -> Tensors:
    library = importlib.import_module("instanttensor")
    with library.safe_open([str(file) for file in files], framework="pt", device=0, copy=False) as opened:
        yield from opened.tensors()


def by_runai(files: list[Path]) -> Tensors:
    library = importlib.import_module("runai_model_streamer")
    with library.SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files], device="cpu")
        yield from streamer.get_tensors()


READERS: dict[str, tuple[str, Callable[[list[Path]], Tensors]]] = {
    "safetensors": ("safetensors", by_safetensors),
    "fastsafetensors": ("fastsafetensors", by_fastsafetensors),
    "InstantTensor": ("instanttensor", by_instanttensor),
    "Run:ai": ("runai-model-streamer", by_runai),
}


def available() -> dict[str, tuple[str, Callable[[list[Path]], Tensors]]]:
    """Readers that are installed, with their versions."""
    found = {}
    for name, (package, reader) in READERS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = (version, reader)
    return found


def vllm_preparation() -> Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]] | None:
    """vLLM's own preparation of one layer for the CuteDSL backend, or None where vLLM is not installed."""
    try:
        platforms = importlib.import_module("vllm.platforms")
        platforms._current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
        utils: Any = importlib.import_module("vllm.model_executor.layers.quantization.utils.flashinfer_fp4_moe")
        activation = importlib.import_module("vllm.model_executor.layers.fused_moe.activation").MoEActivation.SILU
    except ImportError as error:
        print(f"vLLM's preparation is left out: {error}")
        return None

    def prepare(raw: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        parallel = SimpleNamespace(enable_eplb=False)
        config = SimpleNamespace(
            moe_parallel_config=parallel,
            hidden_dim=raw["w2_weight"].shape[1],
            hidden_dim_unpadded=None,
            intermediate_size_per_partition=0,
        )
        layer = SimpleNamespace(moe_config=config, activation=activation)
        return tuple(
            utils.prepare_nvfp4_moe_layer_for_flashinfer_cutedsl(
                layer,
                raw["w13_weight"],
                raw["w13_weight_scale"],
                raw["w13_weight_scale_2"][:, 0],
                raw["w13_input_scale"],
                raw["w2_weight"],
                raw["w2_weight_scale"],
                raw["w2_weight_scale_2"],
                raw["w2_input_scale"],
            )
        )

    return prepare
