"""Everything that a kernel would see of a loaded model, and where two such states differ."""

from __future__ import annotations

from typing import Any

import torch

SIZES = ("num_experts", "num_local_experts", "intermediate_size_per_partition", "hidden_size", "moe_ep_rank")
LEFT_OUT = ("w13_weight_scale_2_up",)


def expert_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The FusedMoE layers of a model by module path."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    return {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Copies of all parameters of the model, and of what each expert layer's kernel gets."""
    inside = tuple(f"{name}." for name in expert_layers(model))
    params = {name: param.detach().clone() for name, param in model.named_parameters() if not name.startswith(inside)}
    return params | experts_state(model)


def experts_state(model: torch.nn.Module) -> dict[str, Any]:
    """What all expert layers hold, as ``"<layer>/<what>"``: parameters, aliases, views, scales, sizes, padding."""
    found = {}
    for name, layer in expert_layers(model).items():
        found |= {f"{name}/{key}": value for key, value in _layer_state(layer).items()}
    return found


def _layer_state(layer: Any) -> dict[str, Any]:
    tensors = dict(layer.named_parameters()) | {k: v for k, v in vars(layer).items() if isinstance(v, torch.Tensor)}
    for name in ("w13_blockscale_swizzled", "w2_blockscale_swizzled", "w13_blockscale_mma", "w2_blockscale_mma"):
        if isinstance(getattr(layer, name, None), torch.Tensor):
            tensors[name] = getattr(layer, name)
    state: dict[str, Any] = {name: t.detach().clone() for name, t in tensors.items() if name not in LEFT_OUT}
    state |= {name: getattr(layer, name, None) for name in (*SIZES, "trtllm_padded_hidden_size")}
    method = layer.quant_method
    state["runner"] = str(getattr(method, "_moe_runner_backend", layer.runner.runner_backend if layer.runner else None))
    state["up first"] = getattr(layer.scheme or method, "load_up_proj_weight_first", None)
    if hasattr(layer, "_cutedsl_wrapper") and hasattr(layer, "w13_blockscale_mma"):
        from sglang.srt.layers.moe.moe_runner.flashinfer_cutedsl import resolve_cutedsl_standard_scales

        names = ("w1_alpha", "fc2_input_scale", "w2_alpha", "used_input_scale")
        resolved = zip(names, resolve_cutedsl_standard_scales(layer), strict=True)
        state |= {f"kernel.{name}": value.clone() for name, value in resolved}
    return state


def storage_of(model: torch.nn.Module) -> dict[str, int]:
    """Addresses of the expert layers' parameters."""
    return {
        f"{name}/{key}": param.data_ptr()
        for name, layer in expert_layers(model).items()
        for key, param in layer.named_parameters()
        if param.numel()
    }


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """Names whose values differ in bytes, shape, stride or dtype."""
    found = [f"{name}: only in one" for name in sorted(expected.keys() ^ actual.keys())]
    return found + [name for name in sorted(expected.keys() & actual.keys()) if not same(expected[name], actual[name])]


def same(one: Any, other: Any) -> bool:
    """Bit equality of tensors, equality of anything else."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    if (one.shape, one.dtype) != (other.shape, other.dtype) or one.stride() != other.stride():
        return False
    return torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in logical order as bytes."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8)
