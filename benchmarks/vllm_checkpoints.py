"""MoE layers at Kimi-K2.5's dimensions as two checkpoints that vLLM opens: the original one and the prepared one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from load_data import LayerFiles, Writer, create, prepared_name, write_layer

from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.checkpoint.tensors import TensorSpec
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.prepared.stamp import make_stamp
from nvfp4_prep_kernels import SCALE_VECTORS, MoeDims
from support.serving.families import DEEPSEEK_V3

LAYER = 0
_FOUR_BIT = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "modelopt",
    "producer": {"name": "modelopt", "version": "0.41.0"},
    "quant_algo": "NVFP4",
    "ignore": ["lm_head", "*self_attn*", "*shared_experts*"],
    "config_groups": {
        "group_0": {"input_activations": _FOUR_BIT, "weights": _FOUR_BIT, "targets": ["Linear"]},
    },
}


def model_config(dims: MoeDims) -> dict[str, Any]:
    """A DeepSeek-V3 of one layer, an MoE layer of these dimensions, and as little else as there can be."""
    return {
        **DEEPSEEK_V3.config,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "hidden_size": dims.hidden,
        "moe_intermediate_size": dims.intermediate,
        "n_routed_experts": dims.experts,
        "num_experts_per_tok": min(8, dims.experts),
        "intermediate_size": 2048,
        "n_group": 1,
        "topk_group": 1,
    }


def write_directories(base: Path, dims: MoeDims, device: torch.device) -> tuple[Path, Path]:
    """Original and prepared checkpoint directories with the same random content."""
    source, prepared = base / "source", base / "prepared"
    files = write_layer(prepared, LAYER, dims, range(dims.experts), device, original=source)
    _write_checkpoints(source, prepared, [files], model_config(dims), QUANTIZATION)
    return source, prepared


VOCABULARY = 16384
"""A tenth of Kimi-K2.5's, as the layers are."""
ATTENTION = {"heads": 64, "nope": 128, "rope": 64, "v": 128, "q_lora": 1536, "kv_lora": 512}
DENSE_INTERMEDIATE = 18432


def write_model(base: Path, dims: MoeDims, layers: int, device: torch.device) -> tuple[Path, Path]:
    """Original and prepared directories of a dense layer and ``layers`` MoE layers, with all that is around them."""
    source, prepared = base / "source", base / "prepared"
    files = [
        write_layer(prepared, layer, dims, range(dims.experts), device, original=source)
        for layer in range(1, layers + 1)
    ]
    _write_others(source / "others.safetensors", dims, layers, device)
    (prepared / "others.safetensors").hardlink_to(source / "others.safetensors")
    sizes = ATTENTION
    config = {
        **model_config(dims),
        "num_hidden_layers": layers + 1,
        "first_k_dense_replace": 1,
        "vocab_size": VOCABULARY,
        "intermediate_size": DENSE_INTERMEDIATE,
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["heads"],
        "qk_nope_head_dim": sizes["nope"],
        "qk_rope_head_dim": sizes["rope"],
        "v_head_dim": sizes["v"],
        "q_lora_rank": sizes["q_lora"],
        "kv_lora_rank": sizes["kv_lora"],
    }
    ignored = [*QUANTIZATION["ignore"], "model.layers.0*"]
    _write_checkpoints(source, prepared, files, config, {**QUANTIZATION, "ignore": ignored})
    return source, prepared


def _other_tensors(dims: MoeDims, layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that is not a routed expert, by name; all bfloat16 but the routers' corrections."""
    hidden, sizes = dims.hidden, ATTENTION
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    for layer in range(layers + 1):
        attention, mlp = (f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp"))
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (hidden,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (hidden,),
            f"{attention}.q_a_proj.weight": (sizes["q_lora"], hidden),
            f"{attention}.q_a_layernorm.weight": (sizes["q_lora"],),
            f"{attention}.q_b_proj.weight": (sizes["heads"] * (sizes["nope"] + sizes["rope"]), sizes["q_lora"]),
            f"{attention}.kv_a_proj_with_mqa.weight": (sizes["kv_lora"] + sizes["rope"], hidden),
            f"{attention}.kv_a_layernorm.weight": (sizes["kv_lora"],),
            f"{attention}.kv_b_proj.weight": (sizes["heads"] * (sizes["nope"] + sizes["v"]), sizes["kv_lora"]),
            f"{attention}.o_proj.weight": (hidden, sizes["heads"] * sizes["v"]),
        }
        dense, width = (mlp, DENSE_INTERMEDIATE) if layer == 0 else (f"{mlp}.shared_experts", dims.intermediate)
        shapes |= {f"{dense}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{dense}.down_proj.weight"] = (hidden, width)
        if layer:
            shapes[f"{mlp}.gate.weight"] = (dims.experts, hidden)
            shapes[f"{mlp}.gate.e_score_correction_bias"] = (dims.experts,)
    return shapes


def _write_others(path: Path, dims: MoeDims, layers: int, device: torch.device) -> None:
    """Random numbers below 1 everywhere: nothing is computed with them."""
    shapes = _other_tensors(dims, layers)
    kinds = {name: "F32" if name.endswith("correction_bias") else "BF16" for name in shapes}
    records = create(path, [TensorSpec(name, kinds[name], shape) for name, shape in shapes.items()])
    writer = Writer()
    for name, record in records.items():
        dtype = torch.float32 if kinds[name] == "F32" else torch.bfloat16
        writer.put(path, record.offset_bytes, torch.rand(shapes[name], device=device, dtype=dtype))
    writer.wait()


def _write_checkpoints(
    source: Path, prepared: Path, layers: list[LayerFiles], config: dict[str, Any], quantization: dict[str, Any]
) -> None:
    """Write configs, indexes and the prepared vectors."""
    stamp = make_stamp(quantization, ConvertOptions(), gated=True)
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (prepared / "config.json").write_text(json.dumps({**config, "quantization_config": stamp}))
    vectors: dict[str, torch.Tensor] = {}
    for files in layers:
        for name in SCALE_VECTORS:
            vector = files.vectors[name]
            largest = vector.max().expand(files.dims.experts).contiguous()
            vectors[prepared_name(files.layer, name)] = largest if name.endswith("input_scale") else vector
    path = prepared / "expert-scales.safetensors"
    records = create(path, [TensorSpec(name, "F32", tuple(vector.shape)) for name, vector in vectors.items()])
    with path.open("r+b") as stream:
        for name, vector in vectors.items():
            stream.seek(records[name].offset_bytes)
            stream.write(byte_view(vector))
    for directory in (source, prepared):
        _write_index(directory)


def _write_index(directory: Path) -> None:
    weight_map: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        weight_map |= dict.fromkeys((record.name for record in read_header(path).tensors), path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
