"""Reading whole checkpoints with the official safetensors library, to compare them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from nvfp4_prep.checkpoint.safetensors_header import read_header
from support.paths import DATA, ROOT

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

IN_REPOSITORY = DATA / "checkpoints"
"""Small real checkpoints, some of them cut down to one layer: see make_checkpoints.py."""
WHOLE = Path(os.environ.get("NVFP4_PREP_CHECKPOINTS", ROOT.parent / "shared" / "checkpoints"))
"""The same checkpoints as their quantizers wrote them, where they are at hand; tests do without them."""


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files; none of them twice."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def read_tensors(folder: Path) -> Tensors:
    """Name to dtype, shape and bytes, over all safetensors files of a directory."""
    return as_bytes(load_tensors(folder))


def as_bytes(tensors: dict[str, torch.Tensor]) -> Tensors:
    """Name to dtype, shape and bytes, to compare with ``==``."""
    return {name: (str(it.dtype), tuple(it.shape), raw_bytes(it)) for name, it in tensors.items()}


def file_digests(folder: Path) -> dict[str, str]:
    """Relative name to sha256 of every file of a directory."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def zero_one_block(prepared: Path) -> None:
    """Zero one block of the first expert of layer 1's w2, as a broken disk does it: the file's time stays."""
    path = prepared / "experts-layer-00001.safetensors"
    record = next(record for record in read_header(path).tensors if record.name.endswith(".w2_weight"))
    mtime_ns = path.stat().st_mtime_ns
    with path.open("r+b") as stream:
        stream.seek(record.offset_bytes)
        stream.write(bytes(8))
    os.utime(path, ns=(mtime_ns, mtime_ns))
