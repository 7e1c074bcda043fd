"""The proof by which a vLLM newer than the tested ones is served: a tiny layer, loaded both ways.

Together with :mod:`nvfp4_prep.vllm.interface` (names and signatures, before anything is registered) and
:mod:`nvfp4_prep.vllm.layout_check` (bytes of the installed preparation, in every version) this is what a version
number stands for. The tiny layer goes once through the installed vLLM's own method, from a source's tensors, and once
through the plugin's, from the prepared ones. Every parameter and every value that the kernel object got must be equal.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE

from nvfp4_prep.errors import ServingError
from nvfp4_prep.serving.completeness import Completeness
from nvfp4_prep.serving.prepared_weights import PreparedWeights
from nvfp4_prep.vllm.up_factor import DERIVED
from nvfp4_prep.vllm.versions import ALLOW_UNTESTED_VARIABLE, TESTED, Support, installed_version, support
from nvfp4_prep_kernels import SCALE_VECTORS, UP_SCALE_VECTOR, MoeDims, MoeLayout, PreparedTensor
from nvfp4_prep_kernels.fingerprint import fingerprint_layer

__all__ = ["prove_untested_version", "tiny_layer_problems"]

logger = init_logger(f"vllm.{__name__}")

_KERNEL_VALUES = ("w1_scale", "w2_scale", "g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale", "gemm1_clamp_limit")
"""What the kernel reads through the layer's quantization config."""
_SCALARS = {"w13_weight_scale_2": 0.0625, "w2_weight_scale_2": 0.125, "w13_input_scale": 0.5, "w2_input_scale": 0.25}
_proved: set[tuple[str, str, bool]] = set()


def prove_untested_version(method: Any, layer: RoutedExperts) -> None:
    """Prove once a process, before the first prepared layer, that an untested vLLM can be served; warn that it is one.

    Args:
        method: the :class:`~nvfp4_prep.vllm.moe_method.PreparedNvFp4MoEMethod` of the first prepared layer.
        layer: the layer, whose parameters are about to be created.

    Raises:
        ServingError: if the tiny layer does not come out equal.
    """
    version = installed_version()
    key = _key(method)
    batched = method.nvfp4_backend == NvFp4MoeBackend.FLASHINFER_CUTEDSL_BATCHED
    if support(version) is not Support.UNTESTED or key in _proved:
        return
    if not batched:  # its kernel object needs a batched all-to-all: only its bytes can be compared
        problems = list(tiny_layer_problems(method, layer))
        if problems:
            raise ServingError(
                f"vLLM {version} is newer than the tested {', '.join(TESTED)}, and a tiny layer loaded by it and by"
                f" nvfp4-prep does not come out equal: {'; '.join(problems)}",
                where=method.layer_name,
                next_step="Install a tested vLLM or a newer nvfp4-prep; do not serve this.",
            )
    _proved.add(key)
    logger.warning_once(
        "nvfp4-prep was not tested with vLLM %s (tested: %s). Signatures, the layout that this vLLM prepares%s agree,"
        " so the prepared checkpoint is served. %s=0 refuses untested versions.",
        version,
        ", ".join(TESTED),
        "" if batched else " and a tiny layer loaded both ways",
        ALLOW_UNTESTED_VARIABLE,
    )


def _key(method: Any) -> tuple[str, str, bool]:
    return method.stamp.layout_name, method.nvfp4_backend.value, method.moe.is_act_and_mul


def tiny_layer_problems(method: Any, layer: RoutedExperts) -> Iterator[str]:
    """Yield where a tiny layer of the installed vLLM and one of the plugin differ, or why there is none."""
    layout = method.stamp.moe_layout(gated=method.moe.is_act_and_mul).for_moe_tp(1)
    try:
        parts = fingerprint_layer(layout)
        stock = _stock(method, layer, parts)
        prepared = _prepared(method, layer, layout, parts)
    except ServingError:
        raise
    except Exception as error:  # whatever an unknown version raises is the finding
        yield f"{type(error).__name__}: {error}"
        return
    for name in sorted(stock.keys() | prepared.keys()):
        if not _same(stock.get(name), prepared.get(name)):
            yield f"{name} differs"


def _stock(method: Any, layer: RoutedExperts, parts: dict[PreparedTensor, tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """Return the state of the tiny layer after the installed vLLM's own preparation."""
    tiny = _tiny(layer, method.moe, _dims(parts))
    stock = ModelOptNvFp4FusedMoE(method.quant_config, tiny.moe_config)
    _create(stock, tiny)
    for tensor, projections in parts.items():
        param = getattr(tiny, tensor.value)
        param.data.view(torch.uint8).copy_(torch.cat(list(projections), dim=1))
    for name, value in _SCALARS.items():
        getattr(tiny, name).data.fill_(value)
    return _finish(stock, tiny)


def _prepared(
    method: Any, layer: RoutedExperts, layout: MoeLayout, parts: dict[PreparedTensor, tuple[torch.Tensor, ...]]
) -> dict[str, Any]:
    """Return the state of the tiny layer after the plugin loaded the prepared tensors."""
    dims = _dims(parts)
    tiny = _tiny(layer, method.moe, dims)
    if not method.asked:
        tiny.moe_config.moe_backend = "auto"  # as it was when the plugin chose: it logs what it chose
    plugin = type(method)(method.quant_config, tiny.moe_config, method.stamp, method.layer_name)
    plugin.completeness = Completeness.ALL
    _proved.add(_key(method))  # not again for this one
    try:
        _create(plugin, tiny)
    finally:
        _proved.discard(_key(method))
    weights: PreparedWeights = tiny.nvfp4_prep
    tensors = {tensor.value: layout.apply(tensor, *projections) for tensor, projections in parts.items()}
    scalars = _SCALARS | {UP_SCALE_VECTOR: _SCALARS["w13_weight_scale_2"]}
    vectors = layout.scale_vectors
    tensors |= {name: torch.full((dims.experts,), scalars[name], dtype=torch.float32) for name in vectors}
    stored = ((name, value.view(weights.placement.dtype(name))) for name, value in tensors.items())
    list(tiny.load_weights(stored))
    return _finish(plugin, tiny)


def _dims(parts: dict[PreparedTensor, tuple[torch.Tensor, ...]]) -> MoeDims:
    experts, intermediate, half_hidden = parts[PreparedTensor.W13_WEIGHT][0].shape
    return MoeDims(experts, intermediate, half_hidden * 2)


def _tiny(layer: RoutedExperts, moe: FusedMoEConfig, dims: MoeDims) -> Any:
    """Return a copy of a layer without its parameters, in the sizes of the fingerprint's layer and for one rank."""
    tiny = copy.copy(layer)
    for holder in ("_parameters", "_buffers", "_modules"):
        setattr(tiny, holder, {})
    tiny.moe_config = dataclasses.replace(
        moe,
        num_experts=dims.experts,
        num_local_experts=dims.experts,
        num_logical_experts=dims.experts,
        experts_per_token=1,
        hidden_dim=dims.hidden,
        hidden_dim_unpadded=dims.hidden,
        intermediate_size=dims.intermediate,
        intermediate_size_per_partition_unpadded=dims.intermediate,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    )
    tiny.expert_map_manager = SimpleNamespace(num_fused_shared_experts=0, expert_map=None)
    tiny._buffers |= {"_expert_map": None, "expert_mask": None}
    tiny.global_num_experts = tiny.local_num_experts = dims.experts
    tiny.hidden_size, tiny.intermediate_size_per_partition = dims.hidden, dims.intermediate
    return tiny


def _create(method: Any, tiny: Any) -> None:
    tiny.quant_method = method
    method.create_weights(
        layer=tiny,
        num_experts=tiny.moe_config.num_experts,
        hidden_size=tiny.moe_config.hidden_dim,
        intermediate_size_per_partition=tiny.moe_config.intermediate_size_per_partition,
        params_dtype=tiny.params_dtype,
        weight_loader=tiny.weight_loader,
        global_num_experts=tiny.moe_config.num_experts,
    )


def _finish(method: Any, tiny: Any) -> dict[str, Any]:
    method.process_weights_after_loading(tiny)
    state: dict[str, Any] = {
        name: getattr(tiny, name).data for name in (*(tensor.value for tensor in PreparedTensor), *SCALE_VECTORS)
    }
    state |= {f"kernel.{name}": getattr(method.moe_quant_config, name, None) for name in _KERNEL_VALUES}
    state |= {f"experts.{name}": getattr(method.moe_kernel.fused_experts, name, None) for name in DERIVED}
    moe = tiny.moe_config
    state["sizes"] = (moe.hidden_dim, moe.hidden_dim_unpadded, moe.intermediate_size_per_partition)
    state["experts class"] = type(method.moe_kernel.fused_experts)
    return state


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    if (one.shape, one.stride(), one.dtype) != (other.shape, other.stride(), other.dtype):
        return False
    flat = [torch.empty(value.shape, dtype=value.dtype).copy_(value).flatten() for value in (one, other)]
    return torch.equal(*(value.view(torch.uint8) for value in flat))
