"""The scheme of prepared layers of compressed-tensors checkpoints, for SGLang's TRTLLM kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A4Nvfp4MoE

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import Stamp
from nvfp4_prep.serving.placement import STORED_TENSORS
from nvfp4_prep.serving.relayout_at_load import RelayoutAtLoad
from nvfp4_prep.sglang.backends import wanted_layout
from nvfp4_prep.sglang.installed_layout import check_installed_layout
from nvfp4_prep.sglang.layer_weights import LayerWeights, check_padding, finish, placement_of, refuse_two_scales
from nvfp4_prep.sglang.relayout import bring_into, relayout_of

__all__ = ["PreparedScheme"]


class PreparedScheme(CompressedTensorsW4A4Nvfp4MoE):  # type: ignore[misc]
    """SGLang's compressed-tensors NVFP4 scheme without its preparation.

    The file has multipliers where the source has reciprocals: input scales are inverted twice, by the converter and
    here, and can differ from the source's in the last bit.
    """

    def __init__(self, stamp: Stamp, layer_name: str) -> None:
        super().__init__()
        if not self.use_flashinfer_trtllm:
            raise ServingError(
                "SGLang serves compressed-tensors NVFP4 experts with the TRTLLM and CUTLASS kernels, and prepared"
                " experts with the first",
                where=layer_name,
                expected="--moe-runner-backend flashinfer_trtllm",
                next_step="Leave --moe-runner-backend out, or serve the source checkpoint (`nvfp4-prep restore`).",
            )
        self.stamp = stamp
        self.layer_name = layer_name
        self.target = wanted_layout(stamp, gated=True, where=layer_name)
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
        share = int(extra_weight_attrs["moe_intermediate_size"]) // int(layer.moe_tp_size)
        if share != intermediate_size_per_partition:
            raise ServingError(
                f"SGLang pads a rank's intermediate size of {share} to {intermediate_size_per_partition} for"
                " compressed-tensors experts, which the file does not",
                where=self.layer_name,
                next_step="Serve with expert parallelism or a smaller tensor-parallel size, with vLLM, or serve the"
                " source checkpoint (`nvfp4-prep restore`).",
            )
        self.stamp.check_fingerprint(gated=True)
        check_installed_layout(self.target)
        placement = placement_of(layer, self.stamp, self.layer_name, hidden_size, intermediate_size_per_partition)
        placement.check()
        check_padding(placement, trtllm=False)  # this scheme pads nothing
        self.relayout = relayout_of(placement, self.target)
        layer.params_dtype = params_dtype
        layer.intermediate_size_per_partition = intermediate_size_per_partition
        layer.nvfp4_prep = LayerWeights(placement, layer, partial(refuse_two_scales, self.layer_name))
        for name in STORED_TENSORS:
            shape = placement.local_shape(name)
            if name == "w13_weight_scale_2":
                shape = (*shape, 2)
            elif name.endswith("input_scale"):
                shape = (layer.num_experts,)
            data = torch.empty(shape, dtype=placement.dtype(name))
            layer.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))
        layer.nvfp4_prep.register(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor arrived and derive what SGLang's scheme derives."""
        weights: LayerWeights = layer.nvfp4_prep
        if not finish(weights):
            return
        weights.check_scales()
        bring_into(layer, self.relayout)
        gate = layer.w13_weight_scale_2[:, 0].contiguous()
        w13_input, w2_input = layer.w13_input_scale.max(), layer.w2_input_scale.max()
        local = gate.shape[0]
        w2_quant = (1 / w2_input).expand(local)
        g1_alphas = w13_input * gate
        derived = {
            "g1_alphas": g1_alphas,
            "g2_alphas": (w2_input * layer.w2_weight_scale_2).to(torch.float32),
            "w13_input_scale_quant": (1 / w13_input).expand(local).contiguous(),
            "w2_input_scale_quant": w2_quant.contiguous(),
            "g1_scale_c": (w2_quant * g1_alphas).to(torch.float32),
        }
        from sglang.srt.layers.utils.common import copy_or_rebind_param

        for name, value in derived.items():
            copy_or_rebind_param(layer, name, value)
