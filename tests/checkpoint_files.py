"""Reading whole checkpoints with the official safetensors library, to compare them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_tensors(folder: Path) -> Tensors:
    """Name to dtype, shape and bytes, over all safetensors files of a directory."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                assert name not in found
                found[name] = (str(tensor.dtype), tuple(tensor.shape), raw_bytes(tensor))
    return found


def file_digests(folder: Path) -> dict[str, str]:
    """Relative name to sha256 of every file of a directory."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
