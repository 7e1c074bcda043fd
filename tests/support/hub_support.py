"""Small things that the Hub tests share."""

from __future__ import annotations

import contextlib
import json
import random
import stat
import struct
import threading
from pathlib import Path
from typing import Self, TypeAlias

from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.tensors import TensorSpec
from nvfp4_prep.hub.errors import Patience
from support.hub_store import Repository

Files: TypeAlias = dict[str, bytes]
QUICK = Patience(first_wait_s=0.01, longest_wait_s=0.05, give_up_after_s=20.0)
"""Retries as in production, with waits that tests can afford."""


def shard(nbytes: int, seed: int, name: str = "tensor") -> bytes:
    """A safetensors file of one random U8 tensor."""
    header, _ = encode_header("shard", [TensorSpec(f"{name}.{seed}", "U8", (nbytes,))])
    return header + random.Random(seed).randbytes(nbytes)


def folder_nbytes(folder: Path) -> int:
    """Bytes of all files below a folder; files may vanish meanwhile, and one that moves counts once."""
    found: dict[int, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.lstat()
            if stat.S_ISREG(facts.st_mode):
                found[facts.st_ino] = facts.st_size
    return sum(found.values())


def make_checkpoint(layers: int = 4, experts: int = 8, shards: int = 8, hidden: int = 256, width: int = 128) -> Files:
    """A small Qwen3-MoE checkpoint as ModelOpt writes it, random bytes, each layer spread over two or three shards."""
    chance = random.Random(7)
    tensors: list[tuple[TensorSpec, bytes]] = [
        (TensorSpec("model.embed_tokens.weight", "BF16", (256, hidden)), chance.randbytes(512 * hidden))
    ]
    for layer in range(layers):
        for expert in range(experts):
            for projection, rows, cols in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
                scales = bytes(chance.randrange(1, 120) for _ in range(rows * cols // 16))
                tensors += [
                    (TensorSpec(f"{name}.weight", "U8", (rows, cols // 2)), chance.randbytes(rows * cols // 2)),
                    (TensorSpec(f"{name}.weight_scale", "F8_E4M3", (rows, cols // 16)), scales),
                    (TensorSpec(f"{name}.weight_scale_2", "F32", ()), struct.pack("<f", 0.01 + expert / 1000)),
                    (TensorSpec(f"{name}.input_scale", "F32", ()), struct.pack("<f", 0.02)),
                ]
    files: Files = {}
    weight_map = {}
    each = -(-len(tensors) // shards)
    for number in range(shards):
        part = tensors[number * each : (number + 1) * each]
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, _ = encode_header(name, [spec for spec, _ in part])
        files[name] = header + b"".join(data for _, data in part)
        weight_map |= {spec.name: name for spec, _ in part}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}, "ignore": []}
    config = {"model_type": "qwen3_moe", "hidden_act": "silu", "quantization_config": quantization}
    files["config.json"] = json.dumps(config).encode()
    files["tokenizer.json"] = json.dumps({"vocabulary": list(range(3000))}).encode()
    files["README.md"] = b"---\nlicense: mit\ntags:\n- moe\nbase_model:\n- org/older\n---\n# The source's card\n"
    return files


def write_checkpoint(folder: Path, files: Files) -> Path:
    """The same files as a directory."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_folder(folder: Path) -> Files:
    """All files of a directory by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class PeakWatch:
    """Measures the largest number of bytes below a folder while the block runs, about every millisecond.

    A look takes a while: it may see a file that is then deleted, and another that was made after that. So a number of
    bytes counts if two looks, one after the other, found as many.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak_nbytes = folder, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        before = 0
        while not self._done.wait(0.001):
            now = folder_nbytes(self.folder)
            self.peak_nbytes = max(self.peak_nbytes, min(before, now))
            before = now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def assert_never_half(repository: Repository, branch: str = "main") -> int:
    """Every state that the branch ever had is either not servable or complete; returns how many were servable."""
    servable = 0
    for commit in repository.history(branch):
        tree = commit.tree
        assert ("config.json" in tree) == ("nvfp4_prep.json" in tree), commit.title
        if "config.json" not in tree:
            continue
        servable += 1
        for name, file in json.loads(tree["nvfp4_prep.json"].data)["files"].items():
            assert name in tree, f"{commit.title}: {name} is missing"
            assert tree[name].sha256 == file["sha256"], f"{commit.title}: {name} is another one"
    return servable
