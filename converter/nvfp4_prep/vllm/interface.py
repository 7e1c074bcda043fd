"""The functions of vLLM that the plugin calls and overrides, and a check that the installed vLLM still has them so.

Used for versions that the plugin was not tested with; importing nothing of vLLM until it is asked.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["CALLED", "OVERRIDDEN", "Called", "Overridden", "interface_problems"]

_LAYERS = "vllm.model_executor.layers"
_LOADERS = "vllm.model_executor.model_loader"


@dataclass(frozen=True)
class Called:
    """A function and the way in which the plugin calls it.

    Attributes:
        module, name: where it is; ``name`` may lead through a class.
        positional: number of positional arguments, ``self`` or ``cls`` of an unbound function included.
        keywords: keyword arguments.
    """

    module: str
    name: str
    positional: int = 0
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Overridden:
    """A method that the plugin overrides: vLLM may pass whatever the parent's signature takes.

    Attributes:
        module, name: of the parent's method.
        accepted: names of the parameters that our method takes.
        any_keyword: whether it takes any other keyword too.
    """

    module: str
    name: str
    accepted: tuple[str, ...]
    any_keyword: bool = False


CALLED = (
    Called(f"{_LAYERS}.quantization", "register_quantization_config", 1),
    Called(f"{_LAYERS}.quantization", "get_quantization_config", 1),
    Called(
        f"{_LAYERS}.quantization.base_config",
        "QuantizationConfig.override_quantization_method",
        2,
        ("hf_config",),
    ),
    Called(f"{_LAYERS}.quantization.modelopt", "ModelOptNvFp4Config.is_layer_excluded", 2),
    Called(f"{_LAYERS}.quantization.modelopt", "ModelOptMixedPrecisionConfig._resolve_quant_algo", 2),
    Called(f"{_LAYERS}.quantization.modelopt", "ModelOptNvFp4FusedMoE.__init__", 3),
    Called(f"{_LAYERS}.quantization.modelopt", "ModelOptNvFp4FusedMoE._restore_padded_moe_dims", 2),
    Called(f"{_LAYERS}.quantization.modelopt", "ModelOptNvFp4FusedMoE._build_moe_kernel", 2),
    Called(
        f"{_LAYERS}.quantization.compressed_tensors.compressed_tensors",
        "CompressedTensorsConfig.get_scheme_dict",
        3,
    ),
    Called(
        f"{_LAYERS}.quantization.compressed_tensors.compressed_tensors",
        "CompressedTensorsConfig._add_fused_moe_to_target_scheme_map",
        1,
    ),
    Called(
        f"{_LAYERS}.fused_moe.oracle.nvfp4",
        "convert_to_nvfp4_moe_kernel_format",
        0,
        (
            *("nvfp4_backend", "layer", "w13", "w13_scale", "w13_scale_2", "a13_scale"),
            *("w2", "w2_scale", "w2_scale_2", "a2_scale", "is_act_and_mul"),
        ),
    ),
    Called(f"{_LAYERS}.fused_moe.oracle.nvfp4", "select_nvfp4_moe_backend", 3),
    Called("vllm.distributed.eplb.eplb_state", "EplbState.build_initial_global_physical_to_logical_map", 2),
    Called(
        "vllm.transformers_utils.model_arch_config_convertor",
        "ModelArchConfigConvertorBase._normalize_quantization_config",
        2,
    ),
    Called("vllm.model_executor.utils", "set_weight_attrs", 2),
    Called("vllm.model_executor.utils", "is_weights_pre_processed"),
    Called(_LOADERS, "register_model_loader", 1),
    Called(_LOADERS, "get_model_loader", 1),
    Called(f"{_LOADERS}.default_loader", "DefaultModelLoader.get_all_weights", 3),
    Called(f"{_LOADERS}.default_loader", "DefaultModelLoader.load_weights", 3),
    Called("vllm.transformers_utils.repo_utils", "get_hf_file_to_dict", 3),
)
OVERRIDDEN = (
    Overridden(
        f"{_LAYERS}.quantization.modelopt", "ModelOptNvFp4FusedMoE.process_weights_after_loading", ("self", "layer")
    ),
    Overridden(
        f"{_LAYERS}.quantization.modelopt",
        "ModelOptNvFp4FusedMoE.create_weights",
        ("self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype"),
        any_keyword=True,
    ),
    Overridden(f"{_LAYERS}.fused_moe", "RoutedExperts.load_weights", ("self", "weights")),
    Overridden(f"{_LOADERS}.default_loader", "DefaultModelLoader.get_all_weights", ("self", "model_config", "model")),
    Overridden(
        f"{_LAYERS}.quantization.base_config", "QuantizationConfig.get_quant_method", ("self", "layer", "prefix")
    ),
    Overridden(f"{_LAYERS}.quantization.base_config", "QuantizationConfig.from_config", ("config",)),
    Overridden(
        f"{_LOADERS}.base_loader", "BaseModelLoader.create_model", ("self", "vllm_config", "model_config", "prefix")
    ),
    Overridden(f"{_LOADERS}.base_loader", "BaseModelLoader.load_weights", ("self", "model", "model_config")),
    Overridden(f"{_LOADERS}.base_loader", "BaseModelLoader.download_model", ("self", "model_config")),
)


def interface_problems() -> Iterator[str]:
    """Yield what the installed vLLM has not, or has in another form."""
    for called in CALLED:
        yield from _call_problem(called)
    for overridden in OVERRIDDEN:
        yield from _override_problem(overridden)


def _call_problem(called: Called) -> Iterator[str]:
    found = _find(called.module, called.name)
    if isinstance(found, str):
        yield found
        return
    try:
        inspect.signature(found).bind(*[None] * called.positional, **dict.fromkeys(called.keywords))
    except TypeError as error:
        yield f"{called.module}.{called.name}{inspect.signature(found)} is called in another way: {error}"


def _override_problem(overridden: Overridden) -> Iterator[str]:
    found = _find(overridden.module, overridden.name)
    if isinstance(found, str):
        yield found
        return
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {name for name, one in inspect.signature(found).parameters.items() if one.kind not in kinds}
    more = sorted(names - set(overridden.accepted))
    less = [] if overridden.any_keyword else sorted(set(overridden.accepted) - names)
    if (more and not overridden.any_keyword) or less:
        yield f"{overridden.module}.{overridden.name}{inspect.signature(found)} takes other arguments: {more + less}"


def _find(module: str, name: str) -> Any:
    """Return an object of vLLM, or the reason why there is none as text."""
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        return f"import of {module} fails: {type(error).__name__}: {error}"
    for part in name.split("."):
        if not hasattr(found, part):
            return f"{module}.{name} does not exist"
        found = getattr(found, part)
    return found
