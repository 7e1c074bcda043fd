"""The MoE method of prepared layers: final shapes at once, no preparation, the same kernel object as vLLM builds."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config, ModelOptNvFp4FusedMoE
from vllm.model_executor.utils import is_weights_pre_processed, set_weight_attrs

from nvfp4_prep.errors import ServingError
from nvfp4_prep.layouts import LAYOUTS, layout_of_backend
from nvfp4_prep.prepared.stamp import Stamp
from nvfp4_prep.serving.completeness import Completeness
from nvfp4_prep.serving.placement import Placement
from nvfp4_prep.serving.relayout_at_load import RelayoutAtLoad
from nvfp4_prep.vllm import reference_moe
from nvfp4_prep.vllm.backend_choice import pin_backend, tell_choice
from nvfp4_prep.vllm.compat import activation_override
from nvfp4_prep.vllm.layout_check import check_installed_layout
from nvfp4_prep.vllm.load_formats import check_load_format, publish_kernel_scales
from nvfp4_prep.vllm.proof import prove_untested_version
from nvfp4_prep.vllm.up_factor import UpFactor, refresh_trtllm_kernel
from nvfp4_prep.vllm.updates import guard_loaders
from nvfp4_prep.vllm.weight_loaders import LayerWeights, load_into
from nvfp4_prep_kernels import UP_SCALE_VECTOR, MoeDims, MoeLayout

__all__ = ["RELAYOUT_VARIABLE", "PreparedNvFp4MoEMethod"]

logger = init_logger(f"vllm.{__name__}")

RELAYOUT_VARIABLE = "NVFP4_PREP_RELAYOUT"
"""Environment variable: 1 allows to reorder gate and up rows while loading, where the kernel wants other blocks."""
_DUMMY_SCALES = {
    "w13_weight_scale": 1.0,
    "w2_weight_scale": 1.0,
    "w13_weight_scale_2": 1e-3,
    "w2_weight_scale_2": 1e-3,
    UP_SCALE_VECTOR: 1e-3,
    "w13_input_scale": 1e-2,
    "w2_input_scale": 1e-2,
}
"""What vLLM's own method gives its scales under --load-format dummy."""


class PreparedNvFp4MoEMethod(ModelOptNvFp4FusedMoE):  # type: ignore[misc]
    """vLLM's ModelOpt NVFP4 method without its preparation."""

    supports_pre_processed_weights = False

    def __init__(
        self, quant_config: ModelOptNvFp4Config, moe_config: FusedMoEConfig, stamp: Stamp, layer_name: str
    ) -> None:
        """Pin the backend; vLLM's own reasons refuse devices, activations, LoRA and the like.

        Raises:
            ServingError: if a backend was asked for that prepared weights cannot be given to, or the deployment takes
                another variant of the kernel and nobody asked for it.
        """
        self.completeness = check_load_format(layer_name)
        if activation_override(quant_config) is not None:
            raise ServingError(
                "an activation override was asked for on top of prepared experts",
                where=layer_name,
                next_step="Remove moe.activation from --quantization-config, or serve the source checkpoint.",
            )
        self.asked = pin_backend(moe_config, stamp, layer_name)
        reference_moe.check_backend(moe_config.moe_backend, layer_name)
        with reference_moe.selecting():
            super().__init__(quant_config, moe_config)
        self.stamp = stamp
        self.layer_name = layer_name
        self._check_variant()
        self.relayout: RelayoutAtLoad | None = None
        if not reference_moe.reference_moe_asked_for():
            tell_choice(moe_config, self.nvfp4_backend.value, asked=self.asked)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters in the sizes that the kernel reads, with loaders of their own."""
        layer.num_experts = num_experts
        layer.params_dtype = params_dtype
        layer.quant_config = self.quant_config
        placement = self._placement(layer, num_experts, hidden_size)
        placement.check()
        self.relayout = self._relayout(placement)
        prove_untested_version(self, layer)
        weights = LayerWeights(placement)
        for name in weights.names:
            data = torch.empty(placement.local_shape(name), dtype=placement.dtype(name))
            param = torch.nn.Parameter(data, requires_grad=False)
            set_weight_attrs(param, {"weight_loader": weights.loader(name)})
            if name in _DUMMY_SCALES:
                set_weight_attrs(param, {"dummy_weight_value": _DUMMY_SCALES[name]})
            layer.register_parameter(name, param)
        guard_loaders()
        layer.nvfp4_prep = weights
        layer.load_weights = load_into(layer, weights)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that every tensor arrived and build the kernel; no weight is touched unless another kernel than the
        file's was asked for.

        After a reload (vLLM gives the layer fresh parameters and then copies them into the old storage) the kernel
        stays as it is, and only what was derived from the scales is brought up to date.
        """
        if is_weights_pre_processed():
            raise ServingError(
                "weights of another process cannot be taken over",
                where=self.layer_name,
                next_step="Load the prepared checkpoint itself, with --load-format auto.",
            )
        weights: LayerWeights = layer.nvfp4_prep
        first = self.moe_kernel is None
        self.completeness.check(weights, reload=not first)
        if self.relayout is not None:
            self.relayout.convert(layer)
        up = UpFactor(layer, self.layer_name)
        trtllm = self.nvfp4_backend == NvFp4MoeBackend.FLASHINFER_TRTLLM
        if not trtllm:
            up.refuse_if_it_differs()
        if first:
            self._restore_padded_moe_dims(layer)
            self._build_moe_kernel(layer)
        experts: Any = self.moe_kernel.fused_experts
        if trtllm:
            up.check_kernel(experts)
        if first:
            weights.in_use = {name: param for name, param in layer.named_parameters() if name in weights.names}
            up.set(self.moe_quant_config)
            if self.completeness is Completeness.ALL_OR_NONE:
                publish_kernel_scales(layer, self.moe_quant_config.a1_gscale, self.moe_quant_config.a2_gscale)
            return
        # The kernel holds 1 / input_scale as tensors of its own.
        self.moe_quant_config.a1_gscale.copy_(1.0 / layer.w13_input_scale)
        self.moe_quant_config.a2_gscale.copy_(1.0 / layer.w2_input_scale)
        if trtllm:
            refresh_trtllm_kernel(layer, experts, self.moe_quant_config, up)
            return
        experts.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Return vLLM's config, or the reference implementation's where the user asked for that."""
        if reference_moe.reference_moe_asked_for():
            return reference_moe.reference_quant_config(layer)
        return super().get_fused_moe_quant_config(layer)

    def _placement(self, layer: RoutedExperts, num_experts: int, hidden_size: int) -> Placement:
        manager, moe = layer.expert_map_manager, layer.moe_config
        if manager.num_fused_shared_experts:
            raise ServingError(
                "shared experts fused into the routed experts cannot be served from a prepared checkpoint",
                where=self.layer_name,
                next_step="Switch the fusion of shared experts off.",
            )
        if moe.num_experts < moe.num_logical_experts:
            raise ServingError(
                "substituted experts cannot be served from a prepared checkpoint",
                where=self.layer_name,
                next_step="Serve the source checkpoint (`nvfp4-prep restore` brings it back).",
            )
        stored = EplbState.build_initial_global_physical_to_logical_map(
            moe.num_logical_experts, moe.num_experts - moe.num_logical_experts
        )
        expert_map = manager.expert_map
        slots = {physical: physical for physical in range(moe.num_experts)}
        if expert_map is not None:
            slots = {slot: physical for physical, slot in enumerate(expert_map.tolist()) if slot >= 0}
        return Placement(
            layer_name=self.layer_name,
            layout=self.stamp.moe_layout(gated=moe.is_act_and_mul),
            dims=MoeDims(moe.num_logical_experts, moe.intermediate_size, hidden_size),
            tp_rank=moe.moe_parallel_config.tp_rank,
            tp_size=moe.moe_parallel_config.tp_size,
            experts=tuple(int(stored[slots[slot]]) for slot in range(num_experts)),
        )

    def _check_variant(self) -> None:
        wanted, stored = layout_of_backend(self.nvfp4_backend.value), LAYOUTS[self.stamp.layout]
        if wanted is self.stamp.layout or self.asked:
            return
        raise ServingError(
            f"prepared for the {stored.kernel} kernel, but this deployment"
            f" uses {self.nvfp4_backend.value} (all2all backend {self.moe.moe_parallel_config.all2all_backend})",
            where=self.layer_name,
            next_step=f"Choose another --all2all-backend, write a checkpoint for it with `nvfp4-prep relayout --layout"
            f" {wanted}`, or give --moe-backend {stored.flag} to rearrange the weights at every start.",
        )

    def _relayout(self, placement: Placement) -> RelayoutAtLoad | None:
        """Return the relayout of the loaded weights; none unless the kernel reads another layout than the file's."""
        stored, moe = placement.layout, placement.dims
        padded = (stored.padded_hidden(moe.hidden), stored.padded_intermediate(moe.intermediate))
        wanted = check_installed_layout(
            self.stamp, self.nvfp4_backend, gated=stored.gated, padded=padded != (moe.hidden, moe.intermediate)
        )
        if wanted == stored:
            return None
        if self._same_kernel(stored, wanted):
            self._check_block_heights(stored, wanted)
        relayout = RelayoutAtLoad.of_share(stored, wanted, moe, placement.tp_size)
        relayout.check(self.layer_name, "--moe-backend")
        if not self._same_kernel(stored, wanted):
            logger.warning_once(
                "The checkpoint was prepared for another kernel (%s): its weights are rearranged on the device for %s"
                " at every start. `nvfp4-prep relayout` does this once and for all.",
                self.stamp.layout_name,
                self.nvfp4_backend.value,
            )
        return relayout

    @staticmethod
    def _same_kernel(stored: MoeLayout, wanted: MoeLayout) -> bool:
        """Return whether two layouts are the CuteDSL kernel's, with blocks of two heights."""
        return stored.name == wanted.name

    def _check_block_heights(self, stored: MoeLayout, wanted: MoeLayout) -> None:
        if os.environ.get(RELAYOUT_VARIABLE) != "1":
            raise ServingError(
                "the installed kernel wants another gate/up block height than the checkpoint has",
                where=self.layer_name,
                expected=f"{wanted.gate_up_block} rows",
                actual=f"{stored.gate_up_block} rows",
                next_step=f"Run `nvfp4-prep relayout --gate-up-block {wanted.gate_up_block}` on the checkpoint, or set"
                f" {RELAYOUT_VARIABLE}=1 to reorder the rows on the GPU at every start.",
            )
        logger.warning_once(
            "Reordering gate and up rows of prepared experts from blocks of %d to %d while loading (%s=1). "
            "`nvfp4-prep relayout` does this once and for all.",
            stored.gate_up_block,
            wanted.gate_up_block,
            RELAYOUT_VARIABLE,
        )
