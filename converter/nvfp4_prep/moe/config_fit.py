"""Facts about MoE layers that the config has and their tensors lack: activation and number of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvfp4_prep._util.text import bounded
from nvfp4_prep.checkpoint.filenames import quoted
from nvfp4_prep.checkpoint.index import CheckpointIndex
from nvfp4_prep.formats import formats, namings
from nvfp4_prep.moe.activation import Activation, ActivationKind, alternating_stacks, find_activation
from nvfp4_prep.moe.declared_kind import declared_refusal, declared_warnings
from nvfp4_prep.moe.discovery import FoundLayers, LayerFinding, find_layers
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.moe.model_config import quantization_configs, text_configs

__all__ = ["classify_layers", "fit_config"]

_COMPUTED = {
    True: (ActivationKind.SILU, ActivationKind.SWIGLUOAI, ActivationKind.SITU),
    False: (ActivationKind.RELU2,),
}
"""Gated or not to the activations that vLLM's FlashInferCuteDSLExperts supports."""
_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def classify_layers(index: CheckpointIndex) -> FoundLayers:
    """Return every MoE layer of a checkpoint by its tensors and its config, with all known namings and formats."""
    alternating = alternating_stacks(index.config)
    found = find_layers(index.tensors, namings(), formats(), alternating=alternating)
    return fit_config(found, index.config, index.hf_quant_config)


def fit_config(
    found: FoundLayers, config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None
) -> FoundLayers:
    """Take out the layers that the kernel cannot compute, that hold fewer experts than the config promises, or that
    the config declares to be of another kind.

    Where only some layers have an activation that the kernel lacks (Step-3.5's last two), they pass through and the
    others are prepared; where all have it, all are refused.
    """
    short = {layer.experts_path: finding for layer in found.layers if (finding := _too_few(layer, config)) is not None}
    declared = quantization_configs(config, hf_quant_config)
    why = declared_refusal(declared)
    if why is not None:
        short = {
            layer.experts_path: LayerFinding(layer.experts_path, why.kind, why.reason, why.instead, why.refused)
            for layer in found.layers
        }
    complete = [layer for layer in found.layers if layer.experts_path not in short]
    activations = {
        layer.experts_path: find_activation(config, gated=layer.gated, layer=layer.index) for layer in complete
    }
    odd = [layer for layer in complete if activations[layer.experts_path].kind not in _COMPUTED[layer.gated]]
    fits = tuple(layer for layer in complete if layer not in odd)
    others = [_not_computed(layer, activations[layer.experts_path], refused=not fits) for layer in odd]
    warnings = tuple(declared_warnings(declared, fits))
    return FoundLayers(fits, (*found.others, *short.values(), *others), activations, warnings)


def _not_computed(layer: MoeLayer, activation: Activation, *, refused: bool) -> LayerFinding:
    word = activation.kind.value if activation.kind is not ActivationKind.UNKNOWN else "unknown"
    spelled = f" (config: {quoted(activation.spelled)})" if activation.spelled and activation.spelled != word else ""
    return LayerFinding(
        layer.experts_path,
        "activation",
        f"{'gated' if layer.gated else 'non-gated'} experts have activation {word}{spelled}; the kernel computes"
        f" {', '.join(_COMPUTED[layer.gated])} for such experts",
        "Serve the source with another MoE backend (flashinfer_cutlass or flashinfer_trtllm).",
        refused,
    )


def _too_few(layer: MoeLayer, config: Mapping[str, Any]) -> LayerFinding | None:
    """Return the finding of a layer whose last experts are missing, which looks whole by its names alone."""
    parts = reversed([*text_configs(config)])  # nested parts win, so they come last
    said = {key: part[key] for part in parts for key in _COUNT_KEYS if type(part.get(key)) is int}
    if not said or layer.dims.experts >= min(said.values()):
        return None
    key = min(said, key=lambda key: said[key])
    return LayerFinding(
        layer.experts_path,
        "incomplete",
        f"holds experts 0 to {layer.dims.experts - 1}, but config.json's {key} is {bounded(str(said[key]), 40)}",
        "Complete the download, or correct config.json.",
        True,
    )
