"""Tensors and shards of a checkpoint as plain values: dtype, shape, and the byte range where a tensor lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["DTYPE_BITS", "ShardHeader", "TensorRecord", "TensorSpec", "tensor_nbytes"]

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is not in a file yet: name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Place of one tensor: ``nbytes`` bytes of ``file`` from ``offset_bytes``, counted from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class ShardHeader:
    """The parsed header of a shard.

    Attributes:
        file: file name relative to the checkpoint.
        file_nbytes: size of the whole file.
        data_start: first byte of the data section.
        sha256: digest of the length prefix and the header, which identifies the shard's structure.
        metadata: the ``__metadata__`` entry.
        tensors: records in the order of their offsets.
    """

    file: str
    file_nbytes: int
    data_start: int
    sha256: str
    metadata: Mapping[str, str]
    tensors: tuple[TensorRecord, ...]


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor.

    Raises:
        KeyError: if the dtype is unknown.
        ValueError: if elements smaller than a byte do not fill the last one.
    """
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8
