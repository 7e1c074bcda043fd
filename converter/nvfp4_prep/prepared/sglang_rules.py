"""Rules of SGLang 0.5.23 about sizes and sources: what the model card promises, and what the plugin holds to."""

from __future__ import annotations

from nvfp4_prep_kernels import MoeDims, MoeLayout
from nvfp4_prep_kernels.scale_swizzle import ROW_TILE

__all__ = ["COMPRESSED", "takes_hidden", "takes_padding", "takes_share"]

COMPRESSED = "compressed-tensors"
"""Quantization method whose NVFP4 experts SGLang runs with TRTLLM-gen, and with no CuteDSL kernel."""
_SHARE_ROWS = 128
"""To a multiple of this SGLang pads a rank's intermediate size of compressed-tensors experts, and the file does not."""


def takes_hidden(hidden: int) -> bool:
    """Return whether SGLang, which pads H nowhere, serves it: the file's padding lies in tiles of its own then."""
    return hidden % ROW_TILE == 0


def takes_padding(layout: MoeLayout, dims: MoeDims, *, trtllm: bool) -> bool:
    """Return whether SGLang serves the padded sizes of a file.

    Beside :func:`takes_hidden`: it pads I only for TRTLLM-gen and for experts without gate.

    Args:
        layout: of the file; its gate decides, which no kernel changes.
        dims: unpadded sizes of the layer.
        trtllm: whether SGLang pads I as the file does: for TRTLLM-gen, and not for compressed-tensors.
    """
    padded = layout.padded_intermediate(dims.intermediate) != dims.intermediate
    return takes_hidden(dims.hidden) and (trtllm or not (padded and layout.gated))


def takes_share(intermediate: int, tp_size: int) -> bool:
    """Return whether SGLang leaves a rank's share of compressed-tensors experts in its size."""
    return intermediate // tp_size % _SHARE_ROWS == 0
