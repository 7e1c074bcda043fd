"""Stored tensors without data that know how to load themselves, for loaders that hand tensors on by name.

A server's own code maps the names of a checkpoint to parameters, one model family differently from the other. A
handle travels through it as a tensor on the ``meta`` device: right name, shape and dtype, no bytes. Whoever finally
holds the parameter asks :func:`handle_of` and lets the handle fill it. Code that knows nothing of handles fails
loudly, because nothing can be copied out of a meta tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_prep.checkpoint.safetensors_header import TensorRecord
from nvfp4_prep.errors import LoadError
from nvfp4_prep.load.group_loader import TakesParameters
from nvfp4_prep_kernels import ExpertSlice, PreparedTensor

__all__ = ["TensorHandle", "handle_of", "make_handle"]

_ATTRIBUTE = "nvfp4_prep_handle"
_DTYPES = {tensor.dtype: tensor.torch_dtype for tensor in PreparedTensor}


@dataclass(frozen=True)
class TensorHandle:
    """One big tensor of a prepared layer.

    Attributes:
        loader: does the work; whoever made the handle calls its ``finish``.
        path: the file.
        record: the stored tensor.
        crc32: the manifest's checksums, where they are to be compared.
    """

    loader: TakesParameters
    path: Path
    record: TensorRecord
    crc32: tuple[int, ...] | None

    def load_into(self, parameter: torch.Tensor, part: ExpertSlice, experts: Sequence[int]) -> None:
        """Queue the load of a parameter; see :meth:`ExpertLoader.submit`. The data is there after ``finish``."""
        self.loader.submit(self.path, self.record, part, experts, parameter, self.crc32)


def make_handle(
    loader: TakesParameters, path: Path, record: TensorRecord, crc32: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Return a meta tensor of the stored shape and dtype that carries a handle.

    Raises:
        LoadError: if a prepared file holds a tensor of a dtype that none of the big ones has.
    """
    if record.dtype not in _DTYPES:
        raise LoadError(
            "is not a prepared tensor",
            where=f"{path}, tensor {record.name!r}",
            expected=" or ".join(_DTYPES),
            actual=record.dtype,
            next_step="The file is damaged or of something else: run `nvfp4-prep verify` on the directory.",
        )
    tensor = torch.empty(record.shape, dtype=_DTYPES[record.dtype], device="meta")
    setattr(tensor, _ATTRIBUTE, TensorHandle(loader, path, record, crc32))
    return tensor


def handle_of(tensor: torch.Tensor) -> TensorHandle | None:
    """Return the handle that a tensor carries; ``None`` for an ordinary tensor."""
    handle = getattr(tensor, _ATTRIBUTE, None)
    return handle if isinstance(handle, TensorHandle) else None
