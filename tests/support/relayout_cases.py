"""Sources for the tests of relayout, and what must be equal to a direct conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tiny_checkpoints import TinyLayer, merged, others, write

__all__ = ["flip", "same_but_for_provenance", "source"]


def source(folder: Path, *, kind: str = "modelopt", differing: bool = True, **changes: Any) -> Path:
    layers = [
        TinyLayer(f"model.layers.{number}.mlp.experts", kind=kind, differing=differing, seed=number, **changes)
        for number in range(2)
    ]
    tensors = merged([*(layer.tensors() for layer in layers), others()])
    write(folder, tensors, shards=3)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def same_but_for_provenance(one: Path, other: Path) -> None:
    """Everything but what says how it was made (manifest's ``verified`` and the card that quotes it)."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {"nvfp4_prep.json", "README.md"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    a, b = (json.loads((folder / "nvfp4_prep.json").read_text()) for folder in (one, other))
    for manifest in (a, b):
        del manifest["verified"], manifest["files"]["README.md"]
    assert a == b


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
