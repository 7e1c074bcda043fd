"""``load_layer``: one rank's share of a prepared layer, and the keyword arguments that FlashInfer's call takes from it.

For servers other than vLLM and for kernel work. What is left to the caller is what depends on the tokens: ``x``,
``x_sf``, ``token_selected_experts``, ``token_final_scales``, ``top_k`` and ``moe_output``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep._util.arguments import ANYTHING, PATH, checked, instance, optional
from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, parse_json
from nvfp4_prep.checkpoint.filenames import CONFIG
from nvfp4_prep.checkpoint.small_files import read_small_file
from nvfp4_prep.errors import CheckpointError, UsageError
from nvfp4_prep.layouts import facts_of
from nvfp4_prep.load import Catalog, LoadedLayer, LoadOptions
from nvfp4_prep.load import load_layer as load_tensors
from nvfp4_prep.load.arguments import as_experts
from nvfp4_prep.moe.kernel_activation import moe_activation
from nvfp4_prep_kernels.flashinfer_moe import activation_arguments, mma_view
from nvfp4_prep_kernels.moe_types import MoeActivation

__all__ = ["ReadyLayer", "load_layer"]


@dataclass(frozen=True)
class ReadyLayer:
    """One rank's share of one layer, ready for ``flashinfer.fused_moe.cute_dsl_fused_moe``.

    Attributes:
        loaded: tensors, manifest record and share, as :func:`nvfp4_prep.load.load_layer` gives them.
        arguments: keyword arguments by FlashInfer's names. The scales are 6-D views of the tensors; making them
            contiguous would reorder their bytes.
        activation: between the two GEMMs, with its parameters.
        x_global_scale: ``float32 [1]``, 1 / input_scale: what the tokens' activations are quantized with (linear
            block scales, not swizzled).
    """

    loaded: LoadedLayer
    arguments: Mapping[str, Any]
    activation: MoeActivation
    x_global_scale: torch.Tensor

    def __repr__(self) -> str:
        return f"<ReadyLayer of {self.loaded!r}, {self.activation}>"

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By short name: see :class:`nvfp4_prep.load.LoadedLayer`."""
        return self.loaded.tensors


@checked(
    path=PATH,
    options=optional(instance(LoadOptions)),
    **dict.fromkeys(("layer", "tp", "ep", "device", "experts"), ANYTHING),  # the loader checks them
)
def load_layer(
    path: Path | str,
    layer: int | str,
    *,
    tp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    experts: Sequence[int] | None = None,
    options: LoadOptions | None = None,
) -> ReadyLayer:
    """Load one rank's share of one prepared layer, reading exactly its bytes.

    Args:
        path: a directory that ``nvfp4-prep convert`` wrote.
        layer: the layer's number, or its experts' module path.
        tp, ep: ``(rank, size)`` of tensor and expert parallelism.
        device: where the tensors go.
        experts: the stored expert of each slot, instead of ``ep``. They must follow each other, because the kernel
            knows its experts by their first number.
        options: of the loader.

    Raises:
        CheckpointError: if the directory is not a complete prepared checkpoint.
        UsageError: if the layer or the rank does not exist, the file does not serve this tensor-parallel size, the
            experts do not follow each other, or the layout is another kernel's: the batched one, for which FlashInfer
            has no single call, or TRTLLM-gen's.
        UnsupportedCheckpointError: if the kernel does not compute the layer's activation.
        LoadError, VerificationError: if the load fails.
    """
    # before anything large is read
    record = Catalog.open(path).layer(layer)
    if not (facts := facts_of(record.layout)).single_call:
        raise UsageError(
            f"the {facts.kernel} layout is not that of FlashInfer's cute_dsl_fused_moe",
            where=str(path),
            next_step="Take the tensors from nvfp4_prep.load.load_layer, or run nvfp4-prep relayout with"
            " --layout cutedsl.",
        )
    if experts is not None:
        experts = as_experts(experts)
        _check_consecutive(experts, record.experts_path)
    activation = moe_activation(record.activation, _config(path), where=record.experts_path)
    loaded = load_tensors(path, layer, tp=tp, ep=ep, experts=experts, device=device, options=options)
    x_global_scale = 1.0 / loaded.tensors["w13_input_scale"][:1]
    return ReadyLayer(loaded, _arguments(loaded, activation), activation, x_global_scale)


def _check_consecutive(experts: Sequence[int], where: str) -> None:
    if not experts or list(experts) != [*range(experts[0], experts[0] + len(experts))]:
        raise UsageError(
            "the kernel takes experts that follow each other",
            where=where,
            expected="numbers that rise by 1",
            actual=", ".join(map(str, experts)) or "none",
        )


def _arguments(loaded: LoadedLayer, activation: MoeActivation) -> dict[str, Any]:
    tensors, held = loaded.tensors, loaded.share.experts or (0,)
    return {
        "w1_weight": tensors["w13_weight"],
        "w1_weight_sf": mma_view(tensors["w13_weight_scale"]),
        "w1_alpha": tensors["w13_weight_scale_2"] * tensors["w13_input_scale"],
        "fc2_input_scale": 1.0 / tensors["w2_input_scale"][:1],
        "w2_weight": tensors["w2_weight"],
        "w2_weight_sf": mma_view(tensors["w2_weight_scale"]),
        "w2_alpha": tensors["w2_weight_scale_2"] * tensors["w2_input_scale"],
        "num_experts": loaded.record.dims.experts,
        "num_local_experts": tensors["w13_weight"].shape[0],
        "local_expert_offset": held[0],
        **activation_arguments(activation),
    }


def _config(path: Path | str) -> Mapping[str, Any]:
    file = Path(path) / CONFIG
    config = parse_json(read_small_file(file, CheckpointError), str(file), CheckpointError, max_depth=MAX_DEPTH)
    if not isinstance(config, Mapping):
        raise CheckpointError("must be a JSON object", where=str(file), actual=type(config).__name__)
    return config
