"""The experts' activation function, from the model's config, as vLLM's model code decides it.

vLLM's kernels know more activations than a config can spell: clamped SwiGLU is ``silu`` with a limit beside it, some
models have their activation in code only, and Step-3.5 has another one in its last layers. What is written here was
read in vLLM 0.33's model files; each entry names them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4_prep.moe.model_config import positive, text_configs

__all__ = ["Activation", "ActivationKind", "alternating_stacks", "find_activation"]


class ActivationKind(enum.StrEnum):
    """Activations by the field's names; the first four are what the CuteDSL kernels compute."""

    SILU = "silu"
    SWIGLUOAI = "swigluoai"
    SITU = "situ"
    RELU2 = "relu2"
    SWIGLUSTEP = "swiglustep"
    GELU = "gelu"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Activation:
    """An activation and its parameters.

    Attributes:
        kind: see :class:`ActivationKind`.
        spelled: the config's own word, empty where the config has none.
        clamp: limit of clamped SwiGLU, where there is one.
    """

    kind: ActivationKind
    spelled: str = ""
    clamp: float | None = None


_KEYS = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function", "act_fn")
_KINDS = {
    "silu": ActivationKind.SILU,
    "swish": ActivationKind.SILU,
    "swiglu": ActivationKind.SILU,
    "swigluoai": ActivationKind.SWIGLUOAI,
    "swiglu_oai": ActivationKind.SWIGLUOAI,
    "situ": ActivationKind.SITU,
    "relu2": ActivationKind.RELU2,
    "relu_squared": ActivationKind.RELU2,
    "swiglustep": ActivationKind.SWIGLUSTEP,
}
_IN_CODE = {"gpt_oss": ActivationKind.SWIGLUOAI}
"""Model types whose activation is in vLLM's code, whatever the config says (gpt_oss.py)."""
_ALTERNATING = frozenset({"gpt_oss"})
_PACKED = frozenset({"minimax_m3", "minimax_m3_vl", "minimax_m3_text"})
"""SWIGLUOAI models with all gate rows before all up rows (minimax_m3/nvidia/model.py: swigluoai_uninterleave)."""
_STEP_TYPES = ("step3p5", "step3p7", "step5")
"""Model types where a layer's ``swiglu_limits`` means SwigluStep, not a clamp (step3p5.py, step5/nvidia/model.py)."""
_LAYER_LIMITS = ("swiglu_limits", "expert_swiglu_limit_list")
"""Lists with one limit for each layer (exaone_moe.py, bailing_moe_v3.py, step3p5.py)."""


def find_activation(config: Mapping[str, Any], *, gated: bool, layer: int = 0) -> Activation:
    """Read the activation of the routed experts of a layer.

    A language model's config may be nested under ``text_config`` (or ``llm_config``), which wins. A config without
    any activation key means SiLU for gated experts (vLLM's default for such models) and is unknown otherwise.

    Args:
        config: ``config.json``.
        gated: whether the layer's experts have a gate projection.
        layer: the layer's number, for models that list a limit for each layer.
    """
    kind, spelled = _spelled(config, gated)
    model_types = _model_types(config)
    kind = next((_IN_CODE[model_type] for model_type in model_types if model_type in _IN_CODE), kind)
    clamp = _clamp(config, layer)
    is_step = any(model_type.startswith(_STEP_TYPES) for model_type in model_types)
    if is_step and kind is ActivationKind.SILU and clamp is not None:
        kind = ActivationKind.SWIGLUSTEP
    return Activation(kind, spelled, clamp)


def alternating_stacks(config: Mapping[str, Any]) -> bool | None:
    """Return whether tensors that hold gate and up together alternate their rows.

    Only SWIGLUOAI models do so, and not all of them. ``None`` for a SWIGLUOAI model that is not known: guessing would
    swap gate and up in silence.
    """
    model_types = set(_model_types(config))
    if model_types & _ALTERNATING:
        return True
    if find_activation(config, gated=True).kind is not ActivationKind.SWIGLUOAI or model_types & _PACKED:
        return False
    return None


def _spelled(config: Mapping[str, Any], gated: bool) -> tuple[ActivationKind, str]:
    for part in text_configs(config):
        for key in _KEYS:
            spelled = part.get(key)
            if isinstance(spelled, str):
                word = spelled.lower().replace("-", "_")
                return ActivationKind.GELU if "gelu" in word else _KINDS.get(word, ActivationKind.UNKNOWN), spelled
    return ActivationKind.SILU if gated else ActivationKind.UNKNOWN, ""


def _model_types(config: Mapping[str, Any]) -> list[str]:
    return [str(part["model_type"]).lower() for part in text_configs(config) if part.get("model_type")]


def _clamp(config: Mapping[str, Any], layer: int) -> float | None:
    for part in text_configs(config):
        for key in _LAYER_LIMITS:
            clamps = part.get(key)
            if isinstance(clamps, list) and layer < len(clamps):
                return positive(clamps[layer])
        clamp = positive(part.get("swiglu_limit"))
        if clamp is not None:
            return clamp
    return None
