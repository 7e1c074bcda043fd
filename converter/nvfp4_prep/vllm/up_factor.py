"""The second factor of the TRTLLM-gen kernels: up's global scale where it differs from gate's.

vLLM computes both factors from gate's scale. For plain SwiGLU the second one, ``g1_scale_c``, multiplies up alone, so
that it can be set from up's own: exact where stock vLLM is not. With a clamp, an offset or SiTU the kernel works with
gate's factor on up too, and experts whose scales differ are refused.
"""

from __future__ import annotations

from typing import Any

import torch

from nvfp4_prep.errors import ServingError
from nvfp4_prep_kernels import UP_SCALE_VECTOR

__all__ = ["DERIVED", "UpFactor", "refresh_trtllm_kernel"]

DERIVED = ("g1_scale_c", "gemm1_clamp_limit", "gemm1_beta", "gemm1_alpha")
"""What the kernel object computes from the scales and registers on the layer."""
_RELAYOUT = "Serve with the CuteDSL kernel: `nvfp4-prep relayout --layout cutedsl` brings gate and up to one scale."


class UpFactor:
    """Up's global scales of one loaded layer, taken off the layer so that the kernel sees its usual parameters."""

    def __init__(self, layer: Any, layer_name: str) -> None:
        self._layer = layer
        self._name = layer_name
        loaded: torch.nn.Parameter | None = getattr(layer, UP_SCALE_VECTOR, None)
        self._up = None if loaded is None else loaded.data
        if loaded is not None:
            delattr(layer, UP_SCALE_VECTOR)
        gate: torch.Tensor = layer.w13_weight_scale_2.data
        self.differs = self._up is not None and not torch.equal(self._up, gate)

    def refuse_if_it_differs(self) -> None:
        """Raise :class:`ServingError` if gate and up need two factors: the CuteDSL kernels take one."""
        if self.differs:
            raise ServingError(
                "gate and up have different global scales, and the CuteDSL kernels take one for both",
                where=self._name,
                next_step="Leave --moe-backend out: the TRTLLM-gen kernels take both. Or bring them to one scale with"
                " `nvfp4-prep relayout --layout cutedsl`.",
            )

    def check_kernel(self, experts: Any) -> None:
        """Raise :class:`ServingError` if this kernel object would use gate's factor for up too."""
        limits = (getattr(experts, name, None) for name in ("gemm1_clamp_limit", "gemm1_beta", "gemm1_alpha"))
        if self.differs and (getattr(experts, "is_situ", False) or any(limit is not None for limit in limits)):
            raise ServingError(
                "gate and up have different global scales, and with this activation the TRTLLM-gen kernel does not"
                " take a factor for up alone",
                where=self._name,
                next_step=_RELAYOUT,
            )

    def set(self, quant_config: Any) -> None:
        """Give the kernel up's factor; call it after the kernel computed both from gate's."""
        if self._up is not None and self.differs:
            up_alpha = self._up * self._layer.w13_input_scale.data
            self._layer.g1_scale_c.data.copy_(up_alpha * quant_config.a2_gscale)


def refresh_trtllm_kernel(layer: Any, experts: Any, quant_config: Any, up: UpFactor) -> None:
    """Bring what a TRTLLM-gen kernel object derived from the scales up to date after a reload.

    The layer holds fresh parameters, which vLLM copies into the old storage afterwards; the kernel keeps reading the
    old storage, where CUDA graphs and EPLB expect it.
    """
    kept = {name: value for name in DERIVED if isinstance(value := getattr(experts, name, None), torch.Tensor)}
    quant_config.g1_alphas.copy_(layer.w13_weight_scale_2.data * layer.w13_input_scale.data)
    experts.process_weights_after_loading(layer)
    up.set(quant_config)
    for name, old in kept.items():
        old.data.copy_(getattr(layer, name).data)
        setattr(experts, name, old)
