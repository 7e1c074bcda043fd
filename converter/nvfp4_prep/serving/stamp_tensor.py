"""The stamp as a tensor, for prepared tensors that reach a running model without a file.

Names and shapes of two layouts are alike: tensors alone do not tell which kernel they were prepared for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, parse_json
from nvfp4_prep.errors import ServingError
from nvfp4_prep.prepared.stamp import STAMP_KEY, Stamp, stamp_in
from nvfp4_prep.serving.updates import read_config

__all__ = ["STAMP_TENSOR", "config_of_stamp_tensor", "stamp_tensor"]

STAMP_TENSOR = STAMP_KEY
"""Its name among the tensors of an update."""
_KEPT = ("quant_method", "format_version", "layout")
_MAX_NBYTES = 65_536


def stamp_tensor(directory: Path | str) -> tuple[str, torch.Tensor]:
    """Return the name and the tensor, uint8 ``[n]`` on the CPU, that go with a prepared checkpoint's tensors.

    Raises:
        ServingError: if the directory has no readable ``config.json`` with a stamp that this version understands.
    """
    folder = Path(directory)
    stamp = stamp_in(read_config(folder))
    if stamp is None:
        raise ServingError(
            "no stamp of nvfp4-prep", where=str(folder), next_step="Give a directory that `nvfp4-prep convert` wrote."
        )
    Stamp.parse(stamp)
    text = json.dumps({**{key: stamp[key] for key in _KEPT}, "source": {}})
    return STAMP_TENSOR, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def config_of_stamp_tensor(tensor: torch.Tensor) -> Mapping[str, Any]:
    """Return what :func:`stamp_tensor` packed, as a ``config.json`` has it.

    Raises:
        ServingError: if the tensor is none of those.
    """
    where = f"tensor {STAMP_TENSOR}"
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _MAX_NBYTES:
        raise ServingError(
            "is not a stamp", where=where, expected="uint8 [n]", actual=f"{tensor.dtype} {list(tensor.shape)}"
        )
    return {"quantization_config": parse_json(bytes(tensor.tolist()), where, ServingError, max_depth=MAX_DEPTH)}
