"""Small NVFP4 MoE checkpoints with the config fields and tensor names of real model families, made of hash bytes.

Each holds all routed experts and enough other tensors to see that those pass through. Tensors that a model would need
for a forward pass but that loading does not check (attention, dense layers) are left out: the tests compare what is
loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data.synthetic_layers import SyntheticLayer

__all__ = ["FAMILIES", "TinyModel", "to_torch"]

TORCH_DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
VOCAB = 64


@dataclass(frozen=True)
class TinyModel:
    """One checkpoint to write.

    Attributes:
        family: model family, for names in test ids.
        config: config.json without sizes of the experts and without quantization_config.
        experts_path: module path of the experts with ``{n}`` for the layer.
        layers: layer numbers of the MoE layers.
        projections: names of gate, up and down (or up and down).
        sizes: E, H, I.
        others: names of tensors besides the experts, with shapes; ``{n}`` stands for each MoE layer.
        sized: config keys of E, H and I; dots lead into sub-configs.
        quant: "modelopt", "modelopt_legacy" (hf_quant_config.json), "modelopt_mixed", "modelopt_mixed_split" (the
            list of layers in hf_quant_config.json alone) or "compressed-tensors".
        ignore: modules that are not quantized.
        equal_gate_up: see SyntheticLayer.
        shards: number of files.
        stacked: one transposed tensor for all experts and one scalar for all, as Llama-4 has them.
        one_scalar: one scalar for all experts though the tensors are per expert: what `stacked` unstacked is.
    """

    family: str
    config: dict[str, Any]
    experts_path: str
    layers: tuple[int, ...]
    projections: tuple[str, ...]
    sized: tuple[str, str, str]
    sizes: tuple[int, int, int] = (8, 256, 128)
    others: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    quant: str = "modelopt"
    ignore: tuple[str, ...] = ("lm_head", "*self_attn*")
    equal_gate_up: bool = True
    shards: int = 2
    stacked: bool = False
    one_scalar: bool = False

    @property
    def gated(self) -> bool:
        return len(self.projections) == 3

    def with_sizes(self, experts: int, hidden: int, intermediate: int) -> TinyModel:
        return replace(self, sizes=(experts, hidden, intermediate))

    def layer(self, number: int) -> SyntheticLayer:
        experts, hidden, intermediate = self.sizes
        return SyntheticLayer(
            experts, hidden, intermediate, self.gated, self.equal_gate_up, label=f"-{self.family}-{number}"
        )

    def write(self, directory: Path) -> Path:
        """Writes config.json, shards and index."""
        directory.mkdir(parents=True)
        config = self._config()
        quant = self._quantization_config()
        if self.quant == "modelopt_mixed_split":
            legacy = {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": None,
                "exclude_modules": list(self.ignore),
            }
            legacy["quantized_layers"] = quant.pop("quantized_layers")
            producer = {"name": "modelopt", "version": "0.40.0"}
            text = json.dumps({"producer": producer, "quantization": legacy})
            (directory / "hf_quant_config.json").write_text(text)
        if self.quant == "modelopt_legacy":
            (directory / "hf_quant_config.json").write_text(json.dumps(quant))
        else:
            config["quantization_config"] = quant
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        tensors = dict(self.tensors())
        weight_map: dict[str, str] = {}
        for shard in range(self.shards):
            # Round robin: every layer and every expert is spread over all shards.
            part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % self.shards == shard}
            file = f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by name."""
        for number in self.layers:
            path = self.experts_path.format(n=number)
            yield from (self._stacked_tensors if self.stacked else self._expert_tensors)(path, number)
        for pattern, shape in self.others.items():
            for name in dict.fromkeys(pattern.format(n=number) for number in self.layers):
                yield name, self._other(name, shape)

    def _expert_tensors(self, path: str, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        spelled = dict(zip(self.layer(number).projections, self.projections, strict=True))
        for name, tensor in self.layer(number).tensors():
            expert, projection, leaf = name.split(".")
            if self.one_scalar and not tensor.shape:
                tensor = self.layer(number).tensor(0, "gate_proj" if projection == "up_proj" else projection, leaf)
            value = to_torch(tensor)
            if self.quant == "compressed-tensors":
                leaf, value = _compressed_tensors_leaf(leaf, value)
            yield f"{path}.{expert}.{spelled[projection]}.{leaf}", value

    def _stacked_tensors(self, path: str, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        layer = self.layer(number)
        for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for leaf, suffix in (("weight", ""), ("weight_scale", "_weight_scale")):
                experts = [
                    torch.cat([to_torch(layer.tensor(e, part, leaf)).view(torch.uint8) for part in parts])
                    for e in range(layer.experts)
                ]
                stack = torch.stack(experts).transpose(1, 2).contiguous()
                yield f"{path}.{fused}{suffix}", stack if leaf == "weight" else stack.view(torch.float8_e4m3fn)
            for leaf in ("weight_scale_2", "input_scale"):
                yield f"{path}.{fused}_{leaf}", to_torch(layer.tensor(0, parts[0], leaf))

    def _other(self, name: str, shape: tuple[int | str, ...]) -> torch.Tensor:
        """A tensor of random values; in a shape, "E" and "H" stand for the sizes."""
        experts, hidden, _ = self.sizes
        sizes = [{"E": experts, "H": hidden}[size] if isinstance(size, str) else size for size in shape]
        count = int(torch.Size(sizes).numel())
        raw = hashlib.shake_256(f"{self.family}/{name}".encode()).digest(2 * count)
        values = torch.frombuffer(bytearray(raw), dtype=torch.int16).to(torch.float32) / 2**16
        bias = name.endswith("e_score_correction_bias")
        return values.reshape(sizes).to(torch.float32 if bias else torch.bfloat16)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(json.dumps(self.config))
        for key, size in zip(self.sized, self.sizes, strict=True):
            *path, last = key.split(".")
            holder = config
            for part in path:
                holder = holder[part]
            holder[last] = size
        return config

    def _quantization_config(self) -> dict[str, Any]:
        if self.quant == "compressed-tensors":
            return _compressed_tensors_config(list(self.ignore))
        if self.quant == "modelopt_legacy":
            inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
            return {
                "producer": {"name": "modelopt", "version": "0.29.0"},
                "quantization": {**inner, "exclude_modules": list(self.ignore)},
            }
        flat = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47.0"}}
        if self.quant.startswith("modelopt_mixed"):
            quantized = {
                self.experts_path.format(n=number): {"quant_algo": "NVFP4", "group_size": 16} for number in self.layers
            }
            return {**flat, "quant_algo": "MIXED_PRECISION", "ignore": list(self.ignore), "quantized_layers": quantized}
        four_bit = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        group = {"input_activations": four_bit, "weights": four_bit, "targets": ["Linear"]}
        return {**flat, "quant_algo": "NVFP4", "config_groups": {"group_0": group}, "ignore": list(self.ignore)}


def to_torch(tensor: Any) -> torch.Tensor:
    """A synthetic tensor as torch holds it."""
    flat = torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8)
    return flat.view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _compressed_tensors_leaf(leaf: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A ModelOpt leaf under its compressed-tensors name; global scales are reciprocals of shape [1]."""
    if leaf == "weight":
        return "weight_packed", value
    if leaf == "weight_scale":
        return leaf, value
    return {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[leaf], 1.0 / value.reshape(1)


def _compressed_tensors_config(ignore: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    activations = {**weights, "dynamic": "local"}
    group = {
        "format": "nvfp4-pack-quantized",
        "input_activations": activations,
        "weights": {**weights, "dynamic": False},
        "targets": ["Linear"],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
_ENDS: dict[str, tuple[int | str, ...]] = {
    "model.embed_tokens.weight": (VOCAB, "H"),
    "model.norm.weight": ("H",),
    "lm_head.weight": (VOCAB, "H"),
    "model.layers.{n}.input_layernorm.weight": ("H",),
}
_GATE = {"model.layers.{n}.mlp.gate.weight": ("E", "H")}
_GATE_BIAS = {"model.layers.{n}.mlp.gate.e_score_correction_bias": ("E",)}
_LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL_NAMES = ("w1", "w3", "w2")

DEEPSEEK_V3 = TinyModel(
    "deepseek_v3",
    _DEEPSEEK,
    "model.layers.{n}.mlp.experts",
    (1, 2),
    _LLAMA_NAMES,
    ("n_routed_experts", "hidden_size", "moe_intermediate_size"),
    others={**_ENDS, **_GATE, **_GATE_BIAS},
    ignore=("lm_head", "*self_attn*", "model.layers.0*", "*shared_experts*"),
)
KIMI_K25 = TinyModel(
    "kimi_k25",
    {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": _DEEPSEEK,
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "model_type": "kimi_k25_vision",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 14,
        },
    },
    "language_model.model.layers.{n}.mlp.experts",
    (1, 2),
    _LLAMA_NAMES,
    ("text_config.n_routed_experts", "text_config.hidden_size", "text_config.moe_intermediate_size"),
    others={f"language_model.{name}": shape for name, shape in {**_ENDS, **_GATE, **_GATE_BIAS}.items()},
    ignore=(
        "language_model.lm_head",
        "*self_attn*",
        "language_model.model.layers.0*",
        "*shared_experts*",
        "vision_tower*",
        "mm_projector*",
    ),
)
QWEN3_MOE = TinyModel(
    "qwen3_moe",
    {
        **_COMMON,
        **_ATTENTION,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "model.layers.{n}.mlp.experts",
    (0, 1),
    _LLAMA_NAMES,
    ("num_experts", "hidden_size", "moe_intermediate_size"),
    others={**_ENDS, **_GATE},
    ignore=("lm_head", "*self_attn*", "model.layers.*.mlp.gate"),
)
MIXTRAL = TinyModel(
    "mixtral",
    {
        **_COMMON,
        **_ATTENTION,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 2,
        "rope_theta": 1e6,
    },
    "model.layers.{n}.block_sparse_moe.experts",
    (0, 1),
    _MIXTRAL_NAMES,
    ("num_local_experts", "hidden_size", "intermediate_size"),
    others={**_ENDS, "model.layers.{n}.block_sparse_moe.gate.weight": ("E", "H")},
)
GLM4_MOE = TinyModel(
    "glm4_moe",
    {
        **_COMMON,
        **_ATTENTION,
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 0,
    },
    "model.layers.{n}.mlp.experts",
    (1, 2),
    _LLAMA_NAMES,
    ("n_routed_experts", "hidden_size", "moe_intermediate_size"),
    others={**_ENDS, **_GATE, **_GATE_BIAS},
    ignore=("lm_head", "*self_attn*", "model.layers.0*", "*shared_experts*"),
)
MINIMAX_M2 = TinyModel(
    "minimax_m2",
    {
        **_COMMON,
        **_ATTENTION,
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "num_hidden_layers": 2,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "rotary_dim": 16,
        "attn_type_list": [1, 1],
        "mtp_transformer_layers": 0,
        "num_mtp_modules": 0,
    },
    "model.layers.{n}.block_sparse_moe.experts",
    (0, 1),
    _MIXTRAL_NAMES,
    ("num_local_experts", "hidden_size", "intermediate_size"),
    others={
        **_ENDS,
        "model.layers.{n}.block_sparse_moe.gate.weight": ("E", "H"),
        "model.layers.{n}.block_sparse_moe.e_score_correction_bias": ("E",),
    },
)
NEMOTRON_H = TinyModel(
    "nemotron_h",
    {
        **_COMMON,
        **_ATTENTION,
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "*E*E",
        "mlp_hidden_act": "relu2",
        "intermediate_size": 256,
        "moe_shared_expert_intermediate_size": 128,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "chunk_size": 32,
        "layer_norm_epsilon": 1e-5,
        "moe_latent_size": None,
    },
    "backbone.layers.{n}.mixer.experts",
    (1, 3),
    ("up_proj", "down_proj"),
    ("n_routed_experts", "hidden_size", "moe_intermediate_size"),
    others={
        "backbone.embeddings.weight": (VOCAB, "H"),
        "backbone.norm_f.weight": ("H",),
        "lm_head.weight": (VOCAB, "H"),
        "backbone.layers.{n}.norm.weight": ("H",),
        "backbone.layers.{n}.mixer.gate.weight": ("E", "H"),
        "backbone.layers.{n}.mixer.gate.e_score_correction_bias": ("E",),
    },
    ignore=("lm_head", "backbone.layers.0.*", "backbone.layers.2.*", "*shared_experts*"),
    sizes=(8, 256, 256),  # so that two ranks need no padding
)

LLAMA4 = TinyModel(
    "llama4",
    {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": {
            **_COMMON,
            **_ATTENTION,
            "model_type": "llama4_text",
            "num_hidden_layers": 2,
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 1,
            "moe_layers": [0, 1],
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 0],
            "num_experts_per_tok": 1,
        },
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    },
    "language_model.model.layers.{n}.feed_forward.experts",
    (0, 1),
    _LLAMA_NAMES,
    ("text_config.num_local_experts", "text_config.hidden_size", "text_config.intermediate_size"),
    others={
        **{f"language_model.{name}": shape for name, shape in _ENDS.items()},
        "language_model.model.layers.{n}.feed_forward.router.weight": ("E", "H"),
    },
    ignore=(
        "*lm_head",
        "*self_attn*",
        "*shared_expert*",
        "*router*",
        "vision_model*",
        "multi_modal_projector*",
    ),
    stacked=True,
)

FAMILIES = {
    model.family: model
    for model in (DEEPSEEK_V3, KIMI_K25, QWEN3_MOE, MIXTRAL, GLM4_MOE, MINIMAX_M2, NEMOTRON_H, LLAMA4)
}
"""All families by name."""
