"""The MoE method of prepared layers of ModelOpt checkpoints: SGLang's own, with its preparation as identities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.layers.moe.moe_runner import flashinfer_cutedsl
from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import trtllm_nvfp4_hidden_alignment
from sglang.srt.layers.quantization import modelopt_quant, utils
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config, ModelOptNvFp4FusedMoEMethod

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import Stamp
from nvfp4_prep.serving.placement import relayout_to
from nvfp4_prep.serving.relayout_at_load import RelayoutAtLoad
from nvfp4_prep.sglang.backends import wanted_layout
from nvfp4_prep.sglang.installed_layout import check_installed_layout
from nvfp4_prep.sglang.layer_weights import LayerWeights, check_padding, finish, placement_of, refuse_two_scales
from nvfp4_prep.sglang.relayout import bring_into, relayout_of

__all__ = ["PreparedModelOptMethod"]


class PreparedModelOptMethod(ModelOptNvFp4FusedMoEMethod):  # type: ignore[misc]
    """SGLang's ModelOpt NVFP4 method without its preparation."""

    def __init__(self, quant_config: ModelOptFp4Config, stamp: Stamp, layer_name: str) -> None:
        super().__init__(quant_config)
        self.stamp = stamp
        self.layer_name = layer_name
        self.relayout: RelayoutAtLoad | None = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters in the sizes that the kernel reads, with loaders of their own."""
        gated = bool(layer.moe_runner_config.is_gated)
        target = wanted_layout(self.stamp, gated=gated, where=self.layer_name)
        self.stamp.check_fingerprint(gated=gated)
        check_installed_layout(target)
        placement = placement_of(layer, self.stamp, self.layer_name, hidden_size, intermediate_size_per_partition)
        placement.check()
        check_padding(placement, trtllm=self.enable_flashinfer_trtllm_moe)
        self.relayout = relayout_of(placement, target)
        self._check_options(layer, hidden_size)
        with _prepared_already():
            super().create_weights(
                layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
            )
        layer.nvfp4_prep = LayerWeights(placement, layer, partial(self._check_takes_two_scales, layer))
        layer.nvfp4_prep.register(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor arrived and let SGLang derive its scales; rows move only for another backend."""
        weights: LayerWeights = layer.nvfp4_prep
        if not finish(weights):
            return
        weights.check_scales()
        bring_into(layer, self.relayout)
        with _prepared_already():
            super().process_weights_after_loading(layer)

    def _check_options(self, layer: Any, hidden_size: int) -> None:
        if getattr(layer, "inference_moe_w13_interleaved", False):
            raise ServingError(
                "this model interleaves gate and up by itself, which prepared experts do not support",
                where=self.layer_name,
                next_step="Serve the source checkpoint (`nvfp4-prep restore` brings it back).",
            )
        alignment = trtllm_nvfp4_hidden_alignment(
            use_per_token_activation=self.quant_config.use_per_token_activation,
            is_gated=layer.moe_runner_config.is_gated,
        )
        if self.enable_flashinfer_trtllm_moe and hidden_size % alignment:
            raise ServingError(
                f"SGLang pads the hidden size to a multiple of {alignment} here, which the file is not",
                where=self.layer_name,
                actual=hidden_size,
                next_step="Unset SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION.",
            )
        if self.enable_flashinfer_trtllm_moe and modelopt_quant.shuffle_matrix_sf_a is None:
            raise ServingError(
                "FlashInfer has no functions for the TRTLLM layout",
                where=self.layer_name,
                next_step="Install the FlashInfer that SGLang asks for.",
            )

    def _check_takes_two_scales(self, layer: Any) -> None:
        """Refuse them for CuteDSL, and what SGLang answers by multiplying block scales in its own row order."""
        if not self.enable_flashinfer_trtllm_moe:
            refuse_two_scales(self.layer_name)
        config = layer.moe_runner_config
        limit = None if config.activation == "situ" else (config.gemm1_clamp_limit or config.swiglu_limit)
        if limit is not None:
            raise ServingError(
                "gate and up have different global scales and the model clamps both: SGLang rescales block scales then",
                where=self.layer_name,
                next_step=f"To make the scales equal, {relayout_to('--layout cutedsl')}.",
            )


@contextlib.contextmanager
def _prepared_already() -> Iterator[None]:
    """While it is entered, SGLang's functions that reorder or swizzle hand back what they get."""

    def same(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return tensor.data

    def static(w13: Any, w2: Any, w13_scale: Any, w2_scale: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, ...]:
        return w13, w13_scale, w2, w2_scale

    with (
        patch.object(modelopt_quant, "swizzle_blockscale", same),
        patch.object(flashinfer_cutedsl, "interleave_w13_halves", same),
        patch.object(utils, "prepare_static_weights_for_trtllm_fp4_moe", static),
    ):
        yield
