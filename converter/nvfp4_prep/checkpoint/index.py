"""The index of a checkpoint: every tensor's byte range, the configs and the other files. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nvfp4_prep._util.text import count, first_of
from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, SOURCE_MAX_DEPTH, parse_json
from nvfp4_prep.checkpoint.contents import recognise
from nvfp4_prep.checkpoint.filenames import CONFIG, HF_QUANT_CONFIG, INDEX, MANIFEST, README, quoted
from nvfp4_prep.checkpoint.index_files import (
    SECOND_COPY,
    check_weight_map,
    split_files,
    top_shards,
    without_second_copy,
)
from nvfp4_prep.checkpoint.lfs_pointer import LFS_MAX_NBYTES, LFS_NEXT_STEP, is_lfs_pointer
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.source import Source, SourceFile
from nvfp4_prep.checkpoint.tensors import ShardHeader, TensorRecord
from nvfp4_prep.errors import SourceError

__all__ = [
    "TEXT_MAX_NBYTES",
    "CheckpointIndex",
    "read_index",
    "read_json_file",
]

TEXT_MAX_NBYTES = {
    CONFIG: 64_000_000,
    HF_QUANT_CONFIG: 64_000_000,
    INDEX: 256_000_000,
    README: 64_000_000,
}
"""Largest sizes of the files that are read whole. The index of Kimi-K2.5 has 25 MB, its configs 100 kB."""


@dataclass(frozen=True)
class CheckpointIndex:
    """Contents of a checkpoint: tensors, configs and other files.

    Attributes:
        headers: shard name to header, in the order of the names.
        tensors: tensor name to record, over all shards.
        config: ``config.json``.
        hf_quant_config: ``hf_quant_config.json`` where it exists.
        texts: the bytes of the small files that a prepared checkpoint replaces, by name.
        side_files: everything that is copied unchanged (tokenizer, code, licence).
        left_out: files that are not part of the model, so that serving ignores them, and why: weights that the index
            does not mention or that are not safetensors, and all files of another checkpoint in a subfolder.
        warnings: what is wrong with the checkpoint and does not keep it from being served or converted.
    """

    headers: Mapping[str, ShardHeader]
    tensors: Mapping[str, TensorRecord]
    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    texts: Mapping[str, bytes]
    side_files: tuple[SourceFile, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def read_index(source: Source) -> CheckpointIndex:
    """Index a source.

    Raises:
        SourceError: if a file is missing, malformed, unsafe or a git-lfs pointer, or a tensor stands in two shards.
    """
    files = {file.name: file for file in source.files()}
    if CONFIG not in files:
        _check_pointers(source, files.values())
        found = recognise(files, "Give the directory of a Hugging Face checkpoint.")
        raise SourceError(f"has no {CONFIG}{found.what}", where=source.where(), next_step=found.next_step)
    texts = {name: _read_small(source, files[name]) for name in TEXT_MAX_NBYTES if name in files}
    # A prepared checkpoint's config holds the source's one level deeper.
    max_depth = MAX_DEPTH if MANIFEST in files else SOURCE_MAX_DEPTH
    parsed = {
        name: read_json_file(source.where(name), raw, max_depth=max_depth)
        for name, raw in texts.items()
        if name != README
    }
    shards, weight_map = _shards(source, files, parsed.get(INDEX))
    side, left_out = split_files(files, shards)
    _check_pointers(source, [*(files[name] for name in shards), *side])
    headers = {name: source.header(name) for name in shards}
    if weight_map is None:
        headers = without_second_copy(source.where(), headers)
        left_out |= {name: SECOND_COPY for name in shards if name not in headers}
    tensors, warnings = _merge(source, headers, weight_map)
    return CheckpointIndex(
        headers=headers,
        tensors=tensors,
        config=parsed[CONFIG],
        hf_quant_config=parsed.get(HF_QUANT_CONFIG),
        texts=texts,
        side_files=side,
        left_out=dict(sorted(left_out.items())),
        warnings=warnings,
    )


def read_json_file(name: str, raw: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Return a JSON object; raise :class:`SourceError` for anything else, or beyond a bound of depth or values."""
    next_step = "It is damaged, or no checkpoint's: restore it or download it again."
    value = parse_json(raw, name, SourceError, max_depth=max_depth, next_step=next_step)
    if not isinstance(value, dict):
        raise SourceError("must be a JSON object", where=name, actual=type(value).__name__, next_step=next_step)
    return value


def _read_small(source: Source, file: SourceFile) -> bytes:
    limit = TEXT_MAX_NBYTES[file.name]
    if file.nbytes > limit:
        raise SourceError(
            "is too large",
            where=source.where(file.name),
            expected=f"at most {limit} bytes",
            actual=f"{file.nbytes} bytes",
        )
    content = source.peek(file.name, 0, file.nbytes)
    if is_lfs_pointer(content):
        raise _pointer_error(source, [file.name])
    return content


def _check_pointers(source: Source, files: Iterable[SourceFile]) -> None:
    """Raise :class:`SourceError` if git-lfs left pointers in a clone. The Hub itself gives no pointers out."""
    if not isinstance(source, LocalSource):
        return
    pointers = [
        file.name
        for file in files
        if file.nbytes <= LFS_MAX_NBYTES and is_lfs_pointer(source.peek(file.name, 0, file.nbytes))
    ]
    if pointers:
        raise _pointer_error(source, pointers)


def _pointer_error(source: Source, names: list[str]) -> SourceError:
    more = f" (and so {'is' if len(names) == 2 else 'are'} {count(len(names) - 1, 'more file')})" if names[1:] else ""
    return SourceError(
        f"is a git-lfs pointer, not the file itself{more}", where=source.where(names[0]), next_step=LFS_NEXT_STEP
    )


def _shards(
    source: Source, files: Mapping[str, SourceFile], index: Mapping[str, Any] | None
) -> tuple[list[str], Mapping[str, str] | None]:
    if index is None:
        return top_shards(source.where(), files), None
    weight_map = check_weight_map(source.where(INDEX), index.get("weight_map"), files)
    return sorted(set(weight_map.values())), weight_map


def _merge(
    source: Source, headers: Mapping[str, ShardHeader], weight_map: Mapping[str, str] | None
) -> tuple[dict[str, TensorRecord], tuple[str, ...]]:
    """Return all tensors, and warnings about the index."""
    tensors: dict[str, TensorRecord] = {}
    for header in headers.values():
        for record in header.tensors:
            if record.name in tensors:
                raise _duplicate_error(source, record.name, (tensors[record.name].file, record.file), weight_map)
            tensors[record.name] = record
    ghosts = []
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            ghosts.append(name)
        elif tensors[name].file != shard:
            raise SourceError(
                f"tensor {quoted(name)} is not where the index says",
                where=source.where(INDEX),
                expected=shard,
                actual=tensors[name].file,
                next_step="The index is wrong, or of another export than the shards: get the one that belongs to them,"
                " or remove it (without an index every *.safetensors file is read).",
            )
    if not ghosts:
        return tensors, ()
    if weight_map is not None and len(ghosts) == len(weight_map):
        raise SourceError(
            "lists none of the tensors that its files hold",
            where=source.where(INDEX),
            actual=first_of(map(quoted, ghosts)),
            next_step="The index is of another checkpoint: get the one that belongs to the shards, or remove it.",
        )
    listed = first_of(map(quoted, ghosts))
    return tensors, (
        f"{INDEX} lists {count(len(ghosts), 'tensor')} that no file holds ({listed}): it is wrong as published;"
        " servers read what the files hold, and so does the conversion",
    )


def _duplicate_error(
    source: Source, name: str, shards: tuple[str, str], weight_map: Mapping[str, str] | None
) -> SourceError:
    where = f"{source.where(shards[0])} and {shards[1]}"
    if weight_map is None:
        return SourceError(
            f"duplicate: tensor {quoted(name)} is in two shards",
            where=where,
            next_step="Files of two exports are in one directory, and no index tells which count: remove one export.",
        )
    return SourceError(
        f"duplicate: tensor {quoted(name)} is in two shards",
        where=where,
        expected=f"only in {weight_map[name]}, as {INDEX} says" if name in weight_map else f"one, listed in {INDEX}",
        actual="both",
        next_step="Shards and index disagree: they are of two exports, or wrong as published. Nothing tells which"
        " values count.",
    )
