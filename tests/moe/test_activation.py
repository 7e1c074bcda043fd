"""Activations as vLLM's model code decides them, from configs as models publish them."""

from __future__ import annotations

from typing import Any

import pytest

from nvfp4_prep.moe.activation import Activation, ActivationKind, alternating_stacks, find_activation

K = ActivationKind
CASES: list[tuple[dict[str, Any], bool, int, Activation]] = [
    ({"hidden_act": "silu"}, True, 0, Activation(K.SILU, "silu")),
    ({}, True, 0, Activation(K.SILU)),
    ({}, False, 0, Activation(K.UNKNOWN)),
    ({"hidden_act": "silu", "swiglu_limit": 10.0}, True, 3, Activation(K.SILU, "silu", 10.0)),
    ({"hidden_act": "silu", "swiglu_limit": 0}, True, 3, Activation(K.SILU, "silu")),
    ({"hidden_act": "silu", "swiglu_limit": True}, True, 3, Activation(K.SILU, "silu")),
    ({"mamba_hidden_act": "silu", "mlp_hidden_act": "relu2"}, False, 0, Activation(K.RELU2, "relu2")),
    ({"text_config": {"hidden_activation": "gelu_pytorch_tanh"}}, True, 0, Activation(K.GELU, "gelu_pytorch_tanh")),
    ({"hidden_act": "quick_gelu", "text_config": {"hidden_act": "silu"}}, True, 0, Activation(K.SILU, "silu")),
    ({"vision_config": {"hidden_act": "gelu"}}, True, 0, Activation(K.SILU)),
    (
        {"text_config": {"hidden_act": "swigluoai", "swiglu_limit": 7.0, "model_type": "minimax_m3_text"}},
        True,
        5,
        Activation(K.SWIGLUOAI, "swigluoai", 7.0),
    ),
    ({"model_type": "gpt_oss", "hidden_act": "silu"}, True, 0, Activation(K.SWIGLUOAI, "silu")),
    ({"model_type": "kimi_k3", "hidden_act": "situ"}, True, 0, Activation(K.SITU, "situ")),
    ({"hidden_act": "mish"}, True, 0, Activation(K.UNKNOWN, "mish")),
    ({"hidden_act": 7, "act_fn": "SiLU"}, True, 0, Activation(K.SILU, "SiLU")),
    # Step-3.5: SwigluStep where the layer has a limit, SiLU elsewhere and beyond the list
    ({"model_type": "step3p5", "swiglu_limits": [0, 7.0, None]}, True, 0, Activation(K.SILU)),
    ({"model_type": "step3p5", "swiglu_limits": [0, 7.0, None]}, True, 1, Activation(K.SWIGLUSTEP, "", 7.0)),
    ({"model_type": "step3p5", "swiglu_limits": [0, 7.0, None]}, True, 2, Activation(K.SILU)),
    ({"model_type": "step3p5", "swiglu_limits": [0, 7.0]}, True, 9, Activation(K.SILU)),
    # the same list in other models is a clamp
    ({"model_type": "exaone_moe", "swiglu_limits": [-1, 5]}, True, 1, Activation(K.SILU, "", 5.0)),
    ({"model_type": "exaone_moe", "swiglu_limits": [-1, 5]}, True, 0, Activation(K.SILU)),
    # a limit that nothing can pass is none
    ({"swiglu_limit": 10**400}, True, 0, Activation(K.SILU)),
    ({"swiglu_limit": float("inf")}, True, 0, Activation(K.SILU)),
    ({"model_type": "step3p5", "swiglu_limits": [float("inf"), 10**400]}, True, 1, Activation(K.SILU)),
    ({"swiglu_limit": float("nan")}, True, 0, Activation(K.SILU)),
]


@pytest.mark.parametrize(("config", "gated", "layer", "expected"), CASES)
def test_activation(config: dict[str, Any], gated: bool, layer: int, expected: Activation) -> None:
    assert find_activation(config, gated=gated, layer=layer) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_act": "silu"}, False),
        ({"model_type": "llama4", "text_config": {"hidden_act": "silu", "model_type": "llama4_text"}}, False),
        ({"model_type": "gpt_oss", "hidden_act": "silu"}, True),
        ({"model_type": "minimax_m3_vl", "text_config": {"hidden_act": "swigluoai"}}, False),
        ({"model_type": "somebody_else", "hidden_act": "swigluoai"}, None),
    ],
)
def test_row_order_of_fused_tensors(config: dict[str, Any], expected: bool | None) -> None:
    assert alternating_stacks(config) is expected
