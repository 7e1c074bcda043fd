"""One MoE layer at Kimi-K2.5's dimensions as two checkpoints that vLLM opens: the original one and the prepared one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from load_data import create, prepared_name, write_layer

from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep.checkpoint.safetensors_header import TensorSpec, read_header
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.prepared.stamp import make_stamp
from nvfp4_prep_kernels import SCALE_VECTORS, MoeDims
from support.serving.families import DEEPSEEK_V3

LAYER = 0
_FOUR_BIT = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
QUANTIZATION = {
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
    stamp = make_stamp(QUANTIZATION, ConvertOptions(), gated=True)
    config = model_config(dims)
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    (prepared / "config.json").write_text(json.dumps({**config, "quantization_config": stamp}))
    vectors = dict(files.vectors)
    for name in ("w13_input_scale", "w2_input_scale"):
        vectors[name] = vectors[name].max().expand(dims.experts).contiguous()
    path = prepared / "expert-scales.safetensors"
    records = create(path, [TensorSpec(prepared_name(LAYER, name), "F32", (dims.experts,)) for name in SCALE_VECTORS])
    with path.open("r+b") as stream:
        for name in SCALE_VECTORS:
            stream.seek(records[prepared_name(LAYER, name)].offset_bytes)
            stream.write(byte_view(vectors[name]))
    for directory in (source, prepared):
        _write_index(directory)
    return source, prepared


def _write_index(directory: Path) -> None:
    weight_map: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        weight_map |= dict.fromkeys((record.name for record in read_header(path).tensors), path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
