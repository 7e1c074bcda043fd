"""Differences between the supported versions of vLLM, all in this module and found by probing, not by version.

What a probe cannot find stands in :data:`nvfp4_prep.vllm.versions.TESTED`. Known differences:

- 0.31 has no activation override in its NVFP4 config (:func:`activation_override`).
- 0.31 and 0.32 do not know ModelOpt's ``MIXED_PRECISION`` in ``hf_quant_config.json`` (:func:`normalized_source`).
- A version without process groups of its tensor-parallel ranks loads each rank by itself
  (:func:`tensor_parallel_ranks`); none of the tested ones is.
- 0.31 does not pad experts for the CuteDSL kernel. That is seen in what it prepares
  (:class:`nvfp4_prep.vllm.layout_check.InstalledLayout`), not here.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from nvfp4_prep.serving.cooperation import Alone, ServerRanks, server_ranks

__all__ = ["activation_override", "is_placeholder", "normalized_source", "tensor_parallel_ranks"]

_MIXED = "modelopt_mixed"


def activation_override(quant_config: Any) -> Any:
    """Return the activation override asked for on the experts, ``None`` where vLLM has none or knows of none."""
    return getattr(quant_config, "moe_activation_override", None)


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no bytes and only records what a loader does with it.

    The transfer engine ``sharded_rdt`` gives such tensors to the loaders once, and repeats their copies later.
    """
    module = sys.modules.get("vllm.distributed.weight_transfer.sharded_rdt_fake")
    return module is not None and isinstance(tensor, module.FakeRDTTensor)


def tensor_parallel_ranks() -> ServerRanks | Alone:
    """Return the ranks between which vLLM divides the columns of experts; a pipeline stage has its own."""
    config = get_current_vllm_config_or_none()
    if config is not None and getattr(config.parallel_config, "enable_expert_parallel", False):
        return Alone("experts are divided, not their columns (expert parallelism)")
    try:
        from vllm.distributed.parallel_state import get_tp_group

        return server_ranks(get_tp_group(), "vLLM")
    except (ImportError, AssertionError) as error:
        return Alone(f"vLLM names no tensor-parallel group ({error})")


def normalized_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a source's ``quantization_config`` with the ``quant_method`` that vLLM gives it."""
    config = copy.deepcopy(dict(source))
    if _is_legacy_mixed(config):
        return {**config, "quant_method": _MIXED}
    holder = SimpleNamespace(quantization_config=config)
    normalized = ModelArchConfigConvertorBase._normalize_quantization_config(None, holder)
    return dict(normalized)


def _is_legacy_mixed(config: Mapping[str, Any]) -> bool:
    """Return whether this is mixed precision as ``hf_quant_config.json`` declares it, which 0.33 maps by itself."""
    producer, quantization = config.get("producer"), config.get("quantization")
    if not isinstance(producer, Mapping) or not isinstance(quantization, Mapping):
        return False
    made_by_modelopt = producer.get("name") == "modelopt" or "modelopt_quant_config" in quantization
    return made_by_modelopt and str(quantization.get("quant_algo")).upper() == "MIXED_PRECISION"
