"""The layers of `synthetic_layers.py` as torch holds them, one tensor for each projection or stacked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data.synthetic_layers import SyntheticLayer, SyntheticTensor

__all__ = ["LLAMA4_PARTS", "stacked_like_llama4", "stacked_rows", "to_torch"]

DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
LLAMA4_PARTS = (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
"""Llama-4's tensors for all experts, and the projections in each."""


def to_torch(tensor: SyntheticTensor) -> torch.Tensor:
    """A synthetic tensor as torch holds it."""
    flat = torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8)
    return flat.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def stacked_rows(layer: SyntheticLayer, projections: tuple[str, ...], leaf: str) -> torch.Tensor:
    """All experts' bytes of some projections, one below the other: uint8 ``[E, rows, columns]``."""
    experts = [
        torch.cat([to_torch(layer.tensor(expert, name, leaf)).view(torch.uint8) for name in projections])
        for expert in range(layer.experts)
    ]
    return torch.stack(experts)


def stacked_like_llama4(layer: SyntheticLayer, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Gate and up in one, transposed, one scalar for all experts: that of expert 0 and its first projection."""
    for fused, projections in LLAMA4_PARTS:
        codes, scales = (
            stacked_rows(layer, projections, leaf).transpose(1, 2).contiguous() for leaf in ("weight", "weight_scale")
        )
        yield f"{path}.{fused}", codes
        yield f"{path}.{fused}_weight_scale", scales.view(torch.float8_e4m3fn)
        for leaf in ("weight_scale_2", "input_scale"):
            yield f"{path}.{fused}_{leaf}", to_torch(layer.tensor(0, projections[0], leaf))
