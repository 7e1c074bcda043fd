"""A layout's fingerprint: the digest of a small fixed layer in that layout.

Stored with a checkpoint, it lets serving code compare what the installed framework makes of the same layer, so that a
changed kernel layout becomes an error instead of wrong results.
"""

from __future__ import annotations

import functools
import hashlib

import torch

from nvfp4_prep_kernels.layout import MoeDims, MoeLayout, PreparedTensor, Projection

__all__ = ["fingerprint", "fingerprint_layer"]


def _dims(gated: bool) -> MoeDims:
    """Return sizes of the fixed layer: no padding, several swizzle tiles both ways, I no multiple of 128 if gated."""
    return MoeDims(experts=2, intermediate=192 if gated else 256, hidden=512)


def fingerprint_layer(layout: MoeLayout) -> dict[PreparedTensor, tuple[torch.Tensor, ...]]:
    """Return the fixed layer's source tensors.

    Byte ``i`` of a projection's codes or scales is byte ``i % 32`` of the sha256 of the text
    ``nvfp4_prep:<tensor>:<projection>:<i // 32>``; scale bytes are taken modulo 126 and increased by 1, so that all
    are positive finite e4m3 values.

    Returns:
        For each prepared tensor the arguments of :meth:`MoeLayout.apply`: ``uint8 [E, rows, bytes per row]`` each.
    """
    dims = _dims(layout.gated)
    return {
        tensor: tuple(_fill(layout, tensor, projection, dims) for projection in layout.projections(tensor))
        for tensor in PreparedTensor
    }


def fingerprint(layout: MoeLayout) -> str:
    """Return the hex sha256 over the four prepared tensors of the fixed layer, in order. Independent of ``moe_tp``."""
    plain = layout.for_moe_tp(1)
    digest = hashlib.sha256()
    for tensor, parts in fingerprint_layer(plain).items():
        digest.update(bytes(plain.apply(tensor, *parts).contiguous().view(-1).tolist()))
    return digest.hexdigest()


def _fill(layout: MoeLayout, tensor: PreparedTensor, projection: Projection, dims: MoeDims) -> torch.Tensor:
    rows, row_nbytes = layout.source_shape(tensor, dims)
    nbytes = dims.experts * rows * row_nbytes
    name = f"nvfp4_prep:{tensor.value}:{projection.value}"
    filled = torch.frombuffer(bytearray(_stream(name, nbytes)), dtype=torch.uint8)
    if tensor.is_scale:
        filled = filled % 126 + 1
    return filled.view(dims.experts, rows, row_nbytes)


@functools.cache  # a few names, half a megabyte in all; made twice a conversion and once for each layer that is served
def _stream(name: str, nbytes: int) -> bytes:
    blocks = (hashlib.sha256(f"{name}:{i}".encode()).digest() for i in range(-(-nbytes // 32)))
    return b"".join(blocks)[:nbytes]
