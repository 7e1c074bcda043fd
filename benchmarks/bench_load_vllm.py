"""The whole load as vLLM does it: one full Kimi-K2.5 layer from a directory to kernel-ready parameters on a GPU.

    python benchmarks/bench_load_vllm.py --directory /mnt/memory

The real Python code of vLLM 0.33 (ModelConfig, model construction, DefaultModelLoader, DeepSeek's load_weights,
weight loaders, process_weights_after_loading), once on the original checkpoint, once on the prepared one through the
same loader, and once on the prepared one with --load-format nvfp4_prep. Replaced, because vLLM's compiled parts need
not fit the machine: the platform (CpuPlatform), the subprocess that inspects models, the answer whether the experts'
kernel supports the device, and the strided view of the scales (FlashInfer). Of process_weights_after_loading only the
experts' method is called: attention would be packed for a CPU. Forward passes are not possible so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from load_data import KIMI, SCALE_VECTORS, LayerFiles, create, prepared_name, write_layer
from measuring import MemoryWatch

from nvfp4_prep.buffers import byte_view
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.safetensors_io import TensorSpec
from nvfp4_prep.stamp import make_stamp

LAYER = 0
QUANTIZATION = {
    "quant_method": "modelopt",
    "producer": {"name": "modelopt", "version": "0.41.0"},
    "quant_algo": "NVFP4",
    "ignore": ["lm_head", "*self_attn*", "*shared_experts*"],
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
}
CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "hidden_size": KIMI.hidden,
    "moe_intermediate_size": KIMI.intermediate,
    "n_routed_experts": KIMI.experts,
    "num_experts_per_tok": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
BIG = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")


def bring_up() -> None:
    """See the module's docstring."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()
    import vllm.model_executor.layers.fused_moe.oracle.nvfp4 as oracle
    import vllm.model_executor.models.registry as registry
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts

    registry._run_in_subprocess = lambda fn: fn()
    oracle.nvfp4_swizzled_scale_to_cutedsl_mma_view = lambda scale: scale
    FlashInferCuteDSLExperts._supports_current_device = staticmethod(lambda: True)
    from nvfp4_prep.vllm import register

    register()


def write_directories(base: Path) -> tuple[Path, Path, LayerFiles]:
    """Original and prepared checkpoint directories of one MoE layer with the same content."""
    source, prepared = base / "source", base / "prepared"
    files = write_layer(prepared, LAYER, KIMI, range(KIMI.experts), torch.device("cuda"), original=source)
    stamp = make_stamp(QUANTIZATION, ConvertOptions(), gated=True)
    (source / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": QUANTIZATION}))
    (prepared / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": stamp}))
    vectors = dict(files.vectors)
    for name in ("w13_input_scale", "w2_input_scale"):
        vectors[name] = vectors[name].max().expand(KIMI.experts).contiguous()
    records = create(
        prepared / "expert-scales.safetensors",
        [TensorSpec(prepared_name(LAYER, name), "F32", (KIMI.experts,)) for name in SCALE_VECTORS],
    )
    with (prepared / "expert-scales.safetensors").open("r+b") as stream:
        for name in SCALE_VECTORS:
            stream.seek(records[prepared_name(LAYER, name)].offset_bytes)
            stream.write(byte_view(vectors[name]))
    for directory in (source, prepared):
        _write_index(directory)
    return source, prepared, files


def _write_index(directory: Path) -> None:
    from safetensors import safe_open

    weight_map = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def vllm_config(directory: Path, load: dict[str, Any]) -> Any:
    from vllm.config import CompilationConfig, DeviceConfig, KernelConfig, LoadConfig, ModelConfig, VllmConfig

    model = ModelConfig(
        model=str(directory),
        tokenizer=str(directory),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
    )
    return VllmConfig(
        model_config=model,
        load_config=LoadConfig(use_tqdm_on_load=False, **load),
        device_config=DeviceConfig("cpu"),
        kernel_config=KernelConfig(moe_backend="flashinfer_cutedsl"),
        compilation_config=CompilationConfig(mode=0),
    )


class Clock:
    """Time inside vLLM's iterator and inside the experts' weight loaders; the rest of a load is matching names."""

    def __init__(self) -> None:
        self.iterator = self.loaders = 0.0
        self.tensors = self.calls = 0

    def iterate(self, weights: Iterator[Any]) -> Iterator[Any]:
        while True:
            begun = time.perf_counter()
            item = next(weights, None)
            self.iterator += time.perf_counter() - begun
            if item is None:
                return
            self.tensors += 1
            yield item

    def loader(self, wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kw: Any) -> Any:
            begun = time.perf_counter()
            try:
                return wrapped(*args, **kw)
            finally:
                self.loaders += time.perf_counter() - begun
                self.calls += 1

        return timed


def load(config: Any, profile: bool) -> tuple[Any, dict[str, Any]]:
    """One load; returns the experts module and the figures."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    clock = Clock()
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(torch.bfloat16), torch.device("cuda"):
            model = loader.create_model(vllm_config=config, model_config=config.model_config)
        experts = next(module for module in model.modules() if isinstance(module, RoutedExperts))
        if profile:
            for parameter in experts.parameters():
                if hasattr(parameter, "weight_loader"):
                    parameter.weight_loader = clock.loader(parameter.weight_loader)
            inner = getattr(loader, "_others", loader)
            original = inner.get_all_weights
            inner.get_all_weights = lambda *args: clock.iterate(original(*args))
        torch.cuda.synchronize()
        # Watching takes processor time, so only the profiled load is watched.
        with MemoryWatch() if profile else contextlib.nullcontext() as watch:
            begun = time.perf_counter()
            with set_default_torch_dtype(torch.bfloat16), torch.device("cuda"):
                loader.load_weights(model, config.model_config)
            torch.cuda.synchronize()
            loaded = time.perf_counter()
            with set_default_torch_dtype(torch.bfloat16):
                experts.quant_method.process_weights_after_loading(experts)
            torch.cuda.synchronize()
            done = time.perf_counter()
    figures = {
        "load": loaded - begun,
        "prepare": done - loaded,
        "total": done - begun,
        "nbytes": sum(getattr(experts, name).numel() for name in BIG),
        "report": getattr(loader, "report", None),
    }
    if profile:
        figures |= {
            "extra_device_gb": watch.extra_torch / 1e9,
            "extra_host_gb": watch.extra_host / 1e9,
            "iterator": clock.iterator,
            "weight_loaders": clock.loaders,
            "names_and_rest": loaded - begun - clock.iterator - clock.loaders,
            "tensors": clock.tensors,
            "loader_calls": clock.calls,
        }
    return experts, figures


def snapshot(experts: Any) -> dict[str, torch.Tensor]:
    """What the kernel reads, on the host."""
    names = (*BIG, "w13_weight_scale_2", "w2_weight_scale_2", "w13_input_scale", "w2_input_scale")
    tensors = {name: getattr(experts, name).detach() for name in names}
    return {name: tensor.contiguous().view(torch.uint8).flatten().cpu() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="memory-backed, 19 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--options", type=json.loads, default={}, help="LoadOptions of nvfp4_prep as JSON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bring_up()
    import vllm

    begun = time.perf_counter()
    source, prepared, _ = write_directories(arguments.directory)
    print(f"vLLM {vllm.__version__}; files built in {time.perf_counter() - begun:.1f} s", flush=True)
    sides = {
        "original, vLLM's default": (source, {}),
        "prepared, vLLM's default": (prepared, {}),
        "prepared, --load-format nvfp4_prep": (
            prepared,
            {"load_format": "nvfp4_prep", "model_loader_extra_config": arguments.options},
        ),
    }
    _groups(vllm_config(source, {}))
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    profiles: dict[str, dict[str, Any]] = {}
    expected: dict[str, torch.Tensor] = {}
    for turn in range(arguments.repeats + 1):
        for name, (directory, options) in sides.items():
            experts, got = load(vllm_config(directory, options), profile=turn == 0)
            if turn == 0:
                profiles[name] = got
                _check(name, snapshot(experts), expected)
            else:
                figures[name].append(got)
                print(
                    f"  {name}: load {got['load']:.4f} s, prepare {got['prepare']:.4f} s; {got['report']}", flush=True
                )
            del experts
            gc.collect()
            torch.cuda.empty_cache()
    _print(figures, profiles)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"figures": figures, "profiles": profiles}, indent=1))


def _groups(config: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo")
    with set_current_vllm_config(config):
        initialize_model_parallel(1, 1)


def _check(name: str, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if not expected:
        expected.update(got)
        return
    different = [key for key in expected if not torch.equal(expected[key], got[key])]
    print(f"{name}: bit-equal to vLLM's own preparation: {different if different else 'yes'}", flush=True)


def _print(figures: dict[str, list[dict[str, Any]]], profiles: dict[str, dict[str, Any]]) -> None:
    print(
        "\n| side | load s: min median max | prepare s | total s (median) | GB/s | against the first | extra GPU GB |"
    )
    print("|---|---|---|---|---|---|---|")
    first = statistics.median(item["total"] for item in next(iter(figures.values())))
    for name, items in figures.items():
        loads = [item["load"] for item in items]
        total = statistics.median(item["total"] for item in items)
        prepare = statistics.median(item["prepare"] for item in items)
        rate, extra = items[0]["nbytes"] / total / 1e9, profiles[name]["extra_device_gb"]
        print(
            f"| {name} | {min(loads):.3f} {statistics.median(loads):.3f} {max(loads):.3f} | {prepare:.3f} | {total:.3f}"
            f" | {rate:.1f} | {first / total:.1f} x | {extra:.2f} |"
        )
    print("\nwhere the first, profiled load went:")
    for name, profile in profiles.items():
        print(f"- {name}: {json.dumps(profile)}")


if __name__ == "__main__":
    main()
