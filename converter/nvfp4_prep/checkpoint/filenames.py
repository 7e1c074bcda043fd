"""File names and kinds: those with a meaning, and the check of names that come from outside."""

from __future__ import annotations

import enum
import re

__all__ = [
    "CONFIG",
    "EXPERTS_PREFIX",
    "EXPERT_SCALES",
    "FORMAT_VERSION",
    "HF_QUANT_CONFIG",
    "INDEX",
    "JOURNAL",
    "MANIFEST",
    "README",
    "SAFETENSORS",
    "SOURCE_SCALES",
    "VERDICTS",
    "WORK_FOLDER",
    "FileKind",
    "is_safe_name",
    "is_text",
    "layer_file_stem",
    "numbered_shard",
    "quoted",
    "restored_shards",
]

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "nvfp4_prep.json"
README = "README.md"

JOURNAL = "journal.jsonl"
"""In the work folder: what is written from what, and which files are finished."""
VERDICTS = "verdicts"
"""In the work folder: as many bytes as smoke tests found something wrong."""
WORK_FOLDER = ".nvfp4_prep"
"""In a target that is being written: lock, journal, temporary files, downloads, parts."""
FORMAT_VERSION = 1
"""Of the prepared checkpoint; format.md has the promise."""
SAFETENSORS = ".safetensors"
"""Ending of the names of all files of tensors that are read or written."""
EXPERTS_PREFIX = "experts-layer-"
"""Files that hold the four big tensors of a layer begin so."""
EXPERT_SCALES = "expert-scales.safetensors"
"""The file of all layers' scale vectors (:data:`nvfp4_prep_kernels.SCALE_VECTORS`)."""
SOURCE_SCALES = "source-scales.safetensors"
"""The file of the source's scalars, for restore."""


def numbered_shard(number: int, count: int) -> str:
    """Return the usual name of shard ``number`` of ``count``, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def restored_shards(count: int) -> frozenset[str]:
    """Return the names of all shards of a restored checkpoint that has so many."""
    return frozenset(numbered_shard(number, count) for number in range(1, count + 1))


_SURROGATE = re.compile("[\ud800-\udfff]")


class FileKind(enum.StrEnum):
    """Content of a file that a conversion writes."""

    EXPERTS = "experts"
    SOURCE_BLOCK_SCALES = "source-block-scales"
    PASSTHROUGH = "passthrough"
    EXPERT_SCALES = "expert-scales"
    SOURCE_SCALES = "source-scales"


def layer_file_stem(index: int) -> str:
    """Return the beginning of the names of the files of the model's layer ``index``."""
    return f"{EXPERTS_PREFIX}{index:05d}"


def is_text(name: str) -> bool:
    """Return whether a name is valid Unicode text: a JSON escape may spell half a surrogate pair."""
    return name.isascii() or _SURROGATE.search(name) is None


def is_safe_name(name: str) -> bool:
    """Return whether a relative name, with forward slashes, is valid text and cannot lead out of its directory."""
    if not is_text(name):
        return False  # from a name that is not UTF-8: no JSON file could carry it
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name and "\0" not in name


def quoted(name: str, limit: int = 200) -> str:
    """Return a name from outside for an error: in quotes, escaped, of bounded length."""
    return repr(name) if len(name) <= limit else f"{name[:limit]!r}…"
