"""The kernel's activation from the manifest's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nvfp4_prep.checkpoint.filenames import quoted
from nvfp4_prep.errors import UnsupportedCheckpointError
from nvfp4_prep.moe.activation import Activation, ActivationKind
from nvfp4_prep.moe.model_config import find_number
from nvfp4_prep_kernels.moe_types import ActivationFunction, MoeActivation

__all__ = ["moe_activation"]

_SWIGLUOAI_LIMIT = 7.0
"""gpt-oss's limit, where the config does not give one."""


def moe_activation(activation: Activation, config: Mapping[str, Any], *, where: str) -> MoeActivation:
    """Return function and parameters as the kernel gets them.

    Args:
        activation: of the layer.
        config: the source's ``config.json``, for SiTU's parameters.
        where: the layer, for messages.

    Raises:
        UnsupportedCheckpointError: if the kernel does not compute it.
    """
    if activation.kind is ActivationKind.SILU:
        return MoeActivation(limit=math.inf if activation.clamp is None else activation.clamp)
    if activation.kind is ActivationKind.SWIGLUOAI:
        return MoeActivation.swigluoai(_SWIGLUOAI_LIMIT if activation.clamp is None else activation.clamp)
    if activation.kind is ActivationKind.RELU2:
        return MoeActivation.relu2()
    if activation.kind is ActivationKind.SITU:
        beta, linear = (find_number(config, [f"activation_situ_{name}"]) for name in ("beta", "linear_beta"))
        if beta is not None:
            return MoeActivation(ActivationFunction.SITU, situ_beta=beta, situ_linear_beta=linear)
    raise UnsupportedCheckpointError(
        f"the kernel cannot be called with the activation {quoted(activation.spelled or activation.kind.value)}",
        where=where,
        expected="SwiGLU, SWIGLUOAI, SiTU (with activation_situ_beta in config.json) or relu2",
    )
