"""Small things that the Hub tests share."""

from __future__ import annotations

import random
from pathlib import Path

from nvfp4_prep.hub.client import Patience
from nvfp4_prep.safetensors_io import TensorSpec, encode_header

QUICK = Patience(first_wait_s=0.01, longest_wait_s=0.05, give_up_after_s=20.0)
"""Retries as in production, with waits that tests can afford."""


def shard(nbytes: int, seed: int, name: str = "tensor") -> bytes:
    """A safetensors file of one random U8 tensor."""
    header, _ = encode_header("shard", [TensorSpec(f"{name}.{seed}", "U8", (nbytes,))])
    return header + random.Random(seed).randbytes(nbytes)


def folder_nbytes(folder: Path) -> int:
    """Bytes of all files below a folder; files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
