"""Records of tensors as a header of one file would have them."""

from __future__ import annotations

import torch

from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.tensors import TensorRecord, TensorSpec
from support.tiny_checkpoints import Tensors

__all__ = ["DTYPES", "records"]

DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}


def records(tensors: Tensors) -> dict[str, TensorRecord]:
    """Return the record of every tensor by name."""
    specs = [TensorSpec(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    return {record.name: record for record in encode_header("m.safetensors", specs)[1]}
