"""Everything that a kernel would see of a loaded model, and where two such states differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of, routed_experts

STORED = (
    "w13_weight",
    "w13_weight_scale",
    "w2_weight",
    "w2_weight_scale",
    "w13_weight_scale_2",
    "w2_weight_scale_2",
    "w13_input_scale",
    "w2_input_scale",
)
KERNEL = ("w1_scale", "w2_scale", "g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale")
EXPERTS = (
    "hidden_dim",
    "intermediate_size_per_partition",
    "local_num_experts",
    "global_num_experts",
    "topk",
    "local_expert_offset",
    "gemm1_clamp_limit",
)


def state_of(directory: Path, **options: Any) -> dict[str, Any]:
    """The expert layers' state after loading."""
    config = make_vllm_config(directory, **{"moe_backend": "auto", **options})
    with rank_of(config):
        return experts_state(load_model(config))


def state_of_open(directory: Path) -> dict[str, Any]:
    """The state of another checkpoint, loaded beside the current one in the same groups."""
    from vllm.config import set_current_vllm_config

    config = make_vllm_config(directory, moe_backend="auto")
    with set_current_vllm_config(config):
        return experts_state(load_model(config))


def storage_of(model: torch.nn.Module) -> dict[str, int]:
    """Addresses of the parameters, and of the tensors that the kernel object holds."""
    addresses = {}
    for name, layer in routed_experts(model).items():
        addresses |= {f"{name}/{key}": param.data_ptr() for key, param in layer.named_parameters()}
        quant = layer.quant_method.moe_quant_config
        addresses |= {f"{name}/kernel.{key}": getattr(quant, key).data_ptr() for key in KERNEL}
        assert quant.w1_scale.data_ptr() == layer.w13_weight_scale.data_ptr()
        assert quant.g1_alphas.data_ptr() == layer.w13_weight_scale_2.data_ptr()
    return addresses


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Copies of all parameters, and of each expert layer's kernel arguments and sizes."""
    layers = list(routed_experts(model).values())
    inside = {f"{path}." for path, module in model.named_modules() if any(module is layer for layer in layers)}
    state: dict[str, Any] = {
        name: param.detach().clone()
        for name, param in model.named_parameters()
        if not any(name.startswith(path) for path in inside)
    }
    return state | experts_state(model)


def experts_state(model: torch.nn.Module) -> dict[str, Any]:
    """What all expert layers hold and what their kernel objects were given, as ``"<layer>/<what>"``."""
    found = {name: _layer_state(layer) for name, layer in routed_experts(model).items()}
    return {f"{name}/{key}": value for name, state in found.items() for key, value in state.items()}


def _layer_state(layer: Any) -> dict[str, Any]:
    method = layer.quant_method
    state: dict[str, Any] = {name: getattr(layer, name).detach().clone() for name in STORED}
    state |= {f"kernel.{name}": getattr(method.moe_quant_config, name).detach().clone() for name in KERNEL}
    experts = method.moe_kernel.fused_experts
    state |= {f"experts.{name}": getattr(experts, name, None) for name in EXPERTS}
    moe = layer.moe_config
    state["sizes"] = (moe.hidden_dim, moe.hidden_dim_unpadded, moe.intermediate_size_per_partition, moe.moe_backend)
    state["classes"] = (type(experts).__name__, method.nvfp4_backend.value)
    return state


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """Names whose values differ in bytes, shape, stride or dtype."""
    found = [f"{name}: only in one" for name in expected.keys() ^ actual.keys()]
    return found + [name for name in sorted(expected.keys() & actual.keys()) if not same(expected[name], actual[name])]


def same(one: Any, other: Any) -> bool:
    """Bit equality of tensors, equality of anything else."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    if (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype):
        return False
    return torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in logical order as bytes."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8)
