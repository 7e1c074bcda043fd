"""The experts' activation function, from the model's config."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Activation", "ActivationKind", "find_activation"]


class ActivationKind(enum.StrEnum):
    """Activations by the field's names; the first three are what the CuteDSL kernels compute."""

    SILU = "silu"
    SWIGLUOAI = "swigluoai"
    RELU2 = "relu2"
    GELU = "gelu"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Activation:
    """An activation and its parameters.

    Attributes:
        kind: see :class:`ActivationKind`.
        spelled: the config's own word, empty where the config has none.
        clamp: limit of clamped SwiGLU (``swiglu_limit``), where there is one.
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
    "relu2": ActivationKind.RELU2,
    "relu_squared": ActivationKind.RELU2,
}


def find_activation(config: Mapping[str, Any], *, gated: bool) -> Activation:
    """Reads the activation of the routed experts.

    A language model's config may be nested under ``text_config`` (or ``llm_config``), which wins. A config without
    any activation key means SiLU for gated experts (the only gated activation of such models) and is unknown otherwise.
    """
    for part in _text_configs(config):
        for key in _KEYS:
            spelled = part.get(key)
            if isinstance(spelled, str):
                word = spelled.lower().replace("-", "_")
                kind = ActivationKind.GELU if "gelu" in word else _KINDS.get(word, ActivationKind.UNKNOWN)
                return Activation(kind, spelled, _clamp(part))
    return Activation(ActivationKind.SILU if gated else ActivationKind.UNKNOWN, "", _clamp(config))


def _text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, Mapping):
            yield nested
    yield config


def _clamp(config: Mapping[str, Any]) -> float | None:
    limit = config.get("swiglu_limit")
    return float(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0 else None
