"""vLLM's load formats at a prepared layer: which are served, which demand every tensor, which are refused by name."""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import QUANT_METHOD
from nvfp4_prep.serving.completeness import Completeness

__all__ = ["check_load_format", "publish_kernel_scales"]

logger = init_logger(f"vllm.{__name__}")

_REFUSED = ("ipc_cache", "sharded_state", "runai_streamer_sharded", "tensorizer")
_PEER_TO_PEER = ("modelexpress", "mx")
"""ModelExpress, under vLLM's name and under the one that its own plugin registers."""


def check_load_format(layer_name: str) -> Completeness:
    """Return what the current load format demands.

    A peer-to-peer target is filled with dummy weights, prepared, and receives all tensors or none later.

    Raises:
        ServingError: if it does not read a checkpoint's tensors.
    """
    current = get_current_vllm_config_or_none()
    load_format = None if current is None else str(current.load_config.load_format)
    if load_format in _REFUSED:
        raise ServingError(
            f"--load-format {load_format} holds weights of a running engine, not a checkpoint's",
            where=layer_name,
            next_step="Use auto, safetensors, fastsafetensors, instanttensor, runai_streamer, modelexpress or"
            " nvfp4_prep.",
        )
    if load_format == "dummy":
        return Completeness.NOTHING
    if load_format in _PEER_TO_PEER:
        return Completeness.ALL_OR_NONE
    if load_format not in (None, QUANT_METHOD):
        logger.info_once("--load-format nvfp4_prep reads each rank's share of the prepared experts only, and faster.")
    return Completeness.ALL


def publish_kernel_scales(layer: torch.nn.Module, a1_gscale: torch.Tensor, a2_gscale: torch.Tensor) -> None:
    """Make the kernel's 1 / input_scale buffers of the layer, so that a peer-to-peer load sends and receives them.

    They are tensors of the kernel object, made from the input scales; a target made them from dummy ones.
    """
    layer.register_buffer("nvfp4_prep_a1_gscale", a1_gscale, persistent=False)
    layer.register_buffer("nvfp4_prep_a2_gscale", a2_gscale, persistent=False)
