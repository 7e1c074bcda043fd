"""The index of a checkpoint: every tensor's byte range, the configs and the other files. Reads headers only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4_prep.errors import SourceError
from nvfp4_prep.paths import CONFIG, HF_QUANT_CONFIG, INDEX, MANIFEST, README, is_safe_name
from nvfp4_prep.safetensors_io import ShardHeader, TensorRecord
from nvfp4_prep.source import Source, SourceFile

__all__ = [
    "CONFIG",
    "HF_QUANT_CONFIG",
    "INDEX",
    "README",
    "WEIGHT_SUFFIXES",
    "CheckpointIndex",
    "read_index",
    "read_json_file",
]

_MAX_JSON_NBYTES = 256_000_000
_NUMBERED_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,6})-of-(?P<count>[0-9]{1,6})\.safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
"""Files of weights, in whatever format, end so."""


@dataclass(frozen=True)
class CheckpointIndex:
    """What a checkpoint consists of.

    Attributes:
        headers: shard name to header, in the order of the names.
        tensors: tensor name to record, over all shards.
        config: ``config.json``.
        hf_quant_config: ``hf_quant_config.json`` where it exists.
        texts: the bytes of the small files that a prepared checkpoint replaces, by name.
        side_files: everything that is copied unchanged (tokenizer, code, licence).
        left_out: weight files that the index does not mention or that are no safetensors; serving ignores them.
    """

    headers: Mapping[str, ShardHeader]
    tensors: Mapping[str, TensorRecord]
    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    texts: Mapping[str, bytes]
    side_files: tuple[SourceFile, ...]
    left_out: tuple[str, ...]


def read_index(source: Source) -> CheckpointIndex:
    """Indexes a source.

    Raises:
        SourceError: if a file is missing, malformed or unsafe, or a tensor stands in two shards.
    """
    files = {file.name: file for file in source.files()}
    if CONFIG not in files:
        raise SourceError(
            f"has no {CONFIG}", where=source.label, next_step="Give the directory of a Hugging Face checkpoint."
        )
    texts = {
        name: _read_small(source, files[name]) for name in (CONFIG, HF_QUANT_CONFIG, INDEX, README) if name in files
    }
    shards, weight_map = _shards(source.label, files, texts.get(INDEX))
    headers = {name: source.header(name) for name in shards}
    tensors = _merge(headers, weight_map)
    side, left_out = _side_files(files, shards)
    quant = texts.get(HF_QUANT_CONFIG)
    return CheckpointIndex(
        headers=headers,
        tensors=tensors,
        config=read_json_file(CONFIG, texts[CONFIG]),
        hf_quant_config=None if quant is None else read_json_file(HF_QUANT_CONFIG, quant),
        texts=texts,
        side_files=side,
        left_out=left_out,
    )


def read_json_file(name: str, raw: bytes) -> dict[str, Any]:
    """Decodes a JSON object; raises :class:`SourceError` if it is none."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SourceError(f"is not valid JSON ({error})", where=name, next_step="Download it again.") from error
    if not isinstance(value, dict):
        raise SourceError(
            "must be a JSON object", where=name, actual=type(value).__name__, next_step="Download it again."
        )
    return value


def _read_small(source: Source, file: SourceFile) -> bytes:
    if file.nbytes > _MAX_JSON_NBYTES:
        raise SourceError(
            "is too large", where=file.name, expected=f"at most {_MAX_JSON_NBYTES} bytes", actual=file.nbytes
        )
    return source.peek(file.name, 0, file.nbytes)


def _shards(
    label: str, files: Mapping[str, SourceFile], index: bytes | None
) -> tuple[list[str], Mapping[str, str] | None]:
    top_level = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if index is None:
        named = [name for name in top_level if name.startswith("model")]
        if not top_level:
            raise SourceError("no safetensors files", where=label, next_step="Is the download complete?")
        _check_numbers(named or top_level)
        return (named or top_level), None
    weight_map = read_json_file(INDEX, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("has no weight_map", where=INDEX, next_step="Download it again.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or not is_safe_name(shard):
            raise SourceError(
                f"unsafe file name for tensor {tensor!r}",
                where=INDEX,
                expected="the name of a file beside the index",
                actual=repr(shard)[:200],
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise SourceError(
            f"names {len(missing)} of {len(shards)} files that do not exist: {', '.join(missing[:5])}"
            + (" …" if len(missing) > 5 else ""),
            where=INDEX,
            next_step="Complete the download.",
        )
    return shards, weight_map


def _check_numbers(names: list[str]) -> None:
    """Without an index, the shards' own numbering is all that tells whether one is missing."""
    numbered = [match for name in names if (match := _NUMBERED_SHARD.fullmatch(name))]
    for stem, count in {(match["stem"], match["count"]) for match in numbered}:
        there = {int(match["number"]) for match in numbered if (match["stem"], match["count"]) == (stem, count)}
        # some writers number from 0
        missing = sorted(set(range(0 if 0 in there else 1, int(count) + (0 not in there))) - there)
        if missing:
            raise SourceError(
                f"{len(missing)} of {int(count)} shards are missing: number {', '.join(map(str, missing[:5]))}"
                + (" …" if len(missing) > 5 else ""),
                where=f"{stem}-*-of-{count}.safetensors",
                next_step="Complete the download.",
            )


def _merge(headers: Mapping[str, ShardHeader], weight_map: Mapping[str, str] | None) -> dict[str, TensorRecord]:
    tensors: dict[str, TensorRecord] = {}
    for header in headers.values():
        for record in header.tensors:
            if record.name in tensors:
                raise SourceError(
                    f"tensor {record.name!r} stands in two shards",
                    where=f"{tensors[record.name].file} and {record.file}",
                    next_step="Remove the files of another download from the directory.",
                )
            tensors[record.name] = record
    for name, shard in (weight_map or {}).items():
        if name not in tensors or tensors[name].file != shard:
            raise SourceError(
                f"tensor {name!r} is not where the index says",
                where=INDEX,
                expected=shard,
                actual=tensors[name].file if name in tensors else "no such tensor",
                next_step="Index and shards are of different downloads: download them again.",
            )
    return tensors


def _side_files(files: Mapping[str, SourceFile], shards: list[str]) -> tuple[tuple[SourceFile, ...], tuple[str, ...]]:
    replaced = {CONFIG, HF_QUANT_CONFIG, INDEX, README, MANIFEST, *shards}
    side, left_out = [], []
    for name, file in files.items():
        if name in replaced:
            continue
        if name.endswith((*WEIGHT_SUFFIXES, ".safetensors.index.json")):
            left_out.append(name)
        else:
            side.append(file)
    return tuple(side), tuple(left_out)
