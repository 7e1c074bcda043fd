"""The config of a small Nemotron-H model, but for its sizes: two attention layers, two MoE layers without gate."""

from __future__ import annotations

from typing import Any

__all__ = ["NEMOTRON_H_CONFIG"]

NEMOTRON_H_CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "num_hidden_layers": 4,
    "hybrid_override_pattern": "*E*E",
    "mlp_hidden_act": "relu2",
    "intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 128,
    "moe_latent_size": None,
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
}
