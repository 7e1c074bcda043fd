"""Config fields and tensor names of real model families, for `tiny_models.py` to write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from support.nemotron_h import NEMOTRON_H_CONFIG
from support.serving.tiny_models import TinyModel

__all__ = ["COMPRESSED", "FAMILIES", "MTP"]

VOCAB = 64

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
        **NEMOTRON_H_CONFIG,
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

COMPRESSED = replace(QWEN3_MOE, quant="compressed-tensors", ignore=("lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"))
"""Qwen3-MoE as llm-compressor writes it."""

MTP = replace(
    DEEPSEEK_V3,
    family="deepseek_v3_mtp",
    config={**_DEEPSEEK, "num_nextn_predict_layers": 1},
    layers=(1, 2, 3),
    others={
        **DEEPSEEK_V3.others,
        "model.layers.3.enorm.weight": ("H",),
        "model.layers.3.hnorm.weight": ("H",),
        "model.layers.3.embed_tokens.weight": (VOCAB, "H"),
        "model.layers.3.shared_head.norm.weight": ("H",),
        "model.layers.3.shared_head.head.weight": (VOCAB, "H"),
    },
    ignore=(*DEEPSEEK_V3.ignore, "*eh_proj*", "*shared_head*", "*.head"),
)
"""DeepSeek-V3 with a layer for multi-token prediction, whose experts are in NVFP4, too."""
