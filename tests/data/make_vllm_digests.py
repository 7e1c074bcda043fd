"""Records what the real vLLM makes of NVFP4 expert layers at load time: sha256 of every expert parameter.

Run in the environment of `make test-vllm`:

    .venv-vllm/bin/python tests/data/make_vllm_digests.py --checkpoints DIR --output tests/data/vllm_digests.json

Two kinds of entries:

- ``synthetic/<name>[/batched][/tp<size>-rank<r>]``: layers of `synthetic_layers.py`, loaded tensor by tensor through
  vLLM's RoutedExperts.load_weights and prepared by its ModelOpt NVFP4 method.
- ``<checkpoint>/<prefix of the experts in the checkpoint>``: small real checkpoints. ``how`` tells whether vLLM loaded
  the whole model from the directory or, where vLLM cannot serve the directory as it is, only the layers' tensors.

For each entry: the padded sizes and, for each tensor, dtype, shape and sha256 of its bytes. ``w13_weight_scale_2`` and
``w2_weight_scale_2`` are the vectors before the kernel object multiplies the input scales into them (what a prepared
file stores); ``w13_alpha`` and ``w2_alpha`` are the products.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from data.synthetic_layers import LAYERS, SyntheticLayer  # noqa: E402
from data.synthetic_torch import LLAMA4_PARTS, to_torch  # noqa: E402
from support.checkpoint_files import load_tensors  # noqa: E402
from support.serving.vllm_on_cpu import bring_up, load_model, make_vllm_config, rank_of, routed_experts  # noqa: E402

BIG = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
TP_SLICES = ((2, 0), (2, 1), (4, 3))
"""(size, rank) for which slices of layers that can be split are recorded too."""

Tensors = Iterable[tuple[str, torch.Tensor]]


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """dtype, shape and digest of one tensor, in storage order of a contiguous tensor."""
    # Not .contiguous(): with one expert a [1] view of stride 2 counts as contiguous and cannot be viewed as bytes.
    data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": digest}


@contextlib.contextmanager
def scales_before_fusing() -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """Copies of both scale_2 vectors of every layer (by id) from just before the input scales are multiplied in."""
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_moe import FlashInferCuteDSLExperts

    seen: dict[int, dict[str, torch.Tensor]] = {}
    original = FlashInferCuteDSLExperts.process_weights_after_loading

    def record(self: Any, layer: torch.nn.Module) -> None:
        names = ("w13_weight_scale_2", "w2_weight_scale_2")
        seen[id(layer)] = {name: getattr(layer, name).detach().clone() for name in names}
        original(self, layer)

    with mock.patch.object(FlashInferCuteDSLExperts, "process_weights_after_loading", record):
        yield seen


def entry(layer: Any, raw_scales: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """The JSON entry of one prepared layer."""
    tensors = {name: getattr(layer, name) for name in BIG}
    tensors |= {name: getattr(layer, name) for name in ("w13_input_scale", "w2_input_scale")}
    if raw_scales is None:
        tensors |= {name: getattr(layer, name) for name in ("w13_weight_scale_2", "w2_weight_scale_2")}
    else:
        tensors |= raw_scales
        tensors |= {"w13_alpha": layer.w13_weight_scale_2, "w2_alpha": layer.w2_weight_scale_2}
    return {
        "padded_hidden": layer.moe_config.hidden_dim,
        "padded_intermediate": layer.moe_config.intermediate_size_per_partition,
        "tensors": {name: describe(tensor) for name, tensor in sorted(tensors.items())},
    }


def prepare_layer(
    tensors: Tensors,
    *,
    sizes: tuple[int, int, int],
    gated: bool,
    batched: bool = False,
    tp: tuple[int, int] = (1, 0),
) -> dict[str, Any]:
    """One layer through RoutedExperts and the ModelOpt method; names as in ``"<expert>.<projection>.<leaf>"``.

    ``sizes`` are E, H and I; ``tp`` is (size, rank). The batched kernel object needs DeepEP, so for ``batched`` the
    preparation runs and the kernel is not built.
    """
    import vllm.model_executor.layers.fused_moe.layer as fused_moe
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    experts, hidden, intermediate = sizes
    parallel = FusedMoEParallelConfig.make_no_parallel()
    parallel.tp_size, parallel.tp_rank = tp
    with mock.patch.object(fused_moe, "make_parallel_config", lambda **_: parallel):
        runner = fused_moe.FusedMoEFactory(
            num_experts=experts,
            top_k=1,
            hidden_size=hidden,
            intermediate_size=intermediate,
            params_dtype=torch.bfloat16,
            quant_config=ModelOptNvFp4Config(is_checkpoint_nvfp4_serialized=True),
            activation="silu" if gated else "relu2_no_mul",
            ckpt_names=("gate_proj", "down_proj", "up_proj") if gated else ("up_proj", "down_proj", None),
            prefix=f"model.layers.{next(LAYER_NUMBERS)}.mlp.experts",
        )
    layer = runner.routed_experts
    for param in layer.parameters():  # a tensor that never arrives must not be zero by luck
        param.data.view(torch.uint8).fill_(0xA5)
    list(layer.load_weights(tensors))
    method = layer.quant_method
    if batched:
        method.nvfp4_backend = NvFp4MoeBackend.FLASHINFER_CUTEDSL_BATCHED
        with mock.patch.object(method, "_build_moe_kernel", lambda _layer: None):
            method.process_weights_after_loading(layer)
        return entry(layer, None)
    with scales_before_fusing() as seen:
        method.process_weights_after_loading(layer)
    return entry(layer, seen[id(layer)])


LAYER_NUMBERS = iter(range(10**6))


def synthetic_entries() -> Iterator[tuple[str, dict[str, Any]]]:
    """All entries of the synthetic layers."""
    for layer in LAYERS:
        sizes = (layer.experts, layer.hidden, layer.intermediate)

        def tensors(layer: SyntheticLayer = layer) -> Tensors:
            return ((name, to_torch(tensor)) for name, tensor in layer.tensors())

        key = f"synthetic/{layer.name}"
        yield key, prepare_layer(tensors(), sizes=sizes, gated=layer.gated)
        if layer.gated and layer.intermediate % 64 == 0 and layer.hidden % 128 == 0:
            yield f"{key}/batched", prepare_layer(tensors(), sizes=sizes, gated=True, batched=True)
        for tp in TP_SLICES:
            suffix = f"tp{tp[0]}-rank{tp[1]}"
            if layer.intermediate % (16 * tp[0]) == 0:
                yield f"{key}/{suffix}", prepare_layer(tensors(), sizes=sizes, gated=layer.gated, tp=tp)
            if layer.gated and layer.intermediate % (64 * tp[0]) == 0 and layer.hidden % 128 == 0:
                made = prepare_layer(tensors(), sizes=sizes, gated=True, batched=True, tp=tp)
                yield f"{key}/batched/{suffix}", made


def whole_model_entries(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The expert layers of a checkpoint that vLLM serves as it is."""
    overrides = HF_OVERRIDES.get(directory.name, {})
    config = make_vllm_config(directory, model={"hf_overrides": overrides})
    with rank_of(config), scales_before_fusing() as seen:
        layers = routed_experts(load_model(config))
        for name, layer in layers.items():
            yield f"{directory.name}/{name}", entry(layer, seen[id(layer)])


def unstack_llama4(tensors: dict[str, torch.Tensor], prefix: str) -> Tensors:
    """Stacked, transposed Llama-4 experts as per-expert ModelOpt leaves."""
    for expert in range(tensors[f"{prefix}.down_proj"].shape[0]):
        for fused, names in LLAMA4_PARTS:
            for leaf, suffix in (("weight", ""), ("weight_scale", "_weight_scale")):
                matrix = tensors[f"{prefix}.{fused}{suffix}"][expert].view(torch.uint8).t()
                for name, part in zip(names, matrix.chunk(len(names)), strict=True):
                    dtype = torch.uint8 if leaf == "weight" else torch.float8_e4m3fn
                    yield f"{expert}.{name}.{leaf}", part.contiguous().view(dtype)
            for leaf in ("weight_scale_2", "input_scale"):
                for name in names:
                    yield f"{expert}.{name}.{leaf}", tensors[f"{prefix}.{fused}_{leaf}"]


def under(tensors: dict[str, torch.Tensor], prefix: str) -> Tensors:
    """The tensors below ``prefix``, named without it."""
    return (
        (name.removeprefix(f"{prefix}."), value) for name, value in tensors.items() if name.startswith(f"{prefix}.")
    )


def layer_entries(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The expert layers of a checkpoint whose names or stacking vLLM does not know, layer by layer."""
    tensors = load_tensors(directory)
    prefixes = sorted({name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name})
    with rank_of(make_vllm_config(directory.parent / "modelopt-qwen3_moe-sharded")):
        for prefix in prefixes:
            stacked = f"{prefix}.down_proj" in tensors
            names = dict(unstack_llama4(tensors, prefix) if stacked else under(tensors, prefix))
            down = names["0.down_proj.weight"]
            experts = 1 + max(int(name.split(".")[0]) for name in names)
            sizes = (experts, down.shape[0], down.shape[1] * 2)
            gated = "0.gate_proj.weight" in names
            yield f"{directory.name}/{prefix}", prepare_layer(names.items(), sizes=sizes, gated=gated)


BY_LAYER = {
    "modelopt-kimi_k25-experts": "layers only: vLLM knows the published names (language_model.model.), not these",
    "modelopt-llama4-experts": "layers only, unstacked by this script: vLLM 0.33 has no parameter for these names",
    "modelopt-nemotron_h-experts": "layers only: vLLM cannot use this file's ignore list and embedding name",
}
HF_OVERRIDES = {
    # transformers does not write topk_method; without it vLLM builds no e_score_correction_bias and cannot load it.
    "modelopt041-deepseek_v3-mlp": {"topk_method": "noaux_tc"},
}
REFUSED = {
    "modelopt-gpt_oss-experts": "vLLM has no NVFP4 gpt-oss path (KeyError: w2_bias)",
    "modelopt-qwen3_moe-w4a16": "W4A16 is not served by the CuteDSL backend",
}


def main() -> None:
    """Writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, help="directory of small real checkpoints (optional)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    bring_up()
    import vllm

    checkpoints: dict[str, str] = {}
    layers: dict[str, dict[str, Any]] = {}
    directories = sorted(args.checkpoints.iterdir()) if args.checkpoints else []
    for directory in directories:
        name = directory.name
        if name in REFUSED:
            checkpoints[name] = f"not recorded: {REFUSED[name]}"
            continue
        checkpoints[name] = BY_LAYER.get(name, "whole model: ModelConfig, DefaultModelLoader, preparation")
        layers |= dict((layer_entries if name in BY_LAYER else whole_model_entries)(directory))
        print(f"{name}: {checkpoints[name]}", file=sys.stderr)
    host = next(path for path in directories if path.name not in BY_LAYER and path.name not in REFUSED)
    with rank_of(make_vllm_config(host)):
        layers |= dict(synthetic_entries())
    made_by = {
        "command": "python tests/data/make_vllm_digests.py --checkpoints DIR --output tests/data/vllm_digests.json",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "moe_backend": "flashinfer_cutedsl",
        "what": "vLLM's own load and load-time preparation on the CPU; see the script's docstring",
        "checkpoints": checkpoints,
    }
    args.output.write_text(json.dumps({"made_by": made_by, "layers": dict(sorted(layers.items()))}, indent=1) + "\n")
    print(f"{len(layers)} layers written to {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
