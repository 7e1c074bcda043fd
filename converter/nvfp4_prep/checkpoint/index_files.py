"""Division of a checkpoint's files into shards, files that are copied, and files that are not part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.contents import ADAPTER_CONFIG, WEIGHT_SUFFIXES, recognise
from nvfp4_prep.checkpoint.filenames import (
    CONFIG,
    HF_QUANT_CONFIG,
    INDEX,
    MANIFEST,
    README,
    SAFETENSORS,
    is_safe_name,
    quoted,
)
from nvfp4_prep.checkpoint.source import SourceFile
from nvfp4_prep.checkpoint.tensors import ShardHeader
from nvfp4_prep.errors import SourceError

__all__ = ["SECOND_COPY", "check_weight_map", "split_files", "top_shards", "without_second_copy"]

_INDEX_SUFFIXES = tuple(f"{suffix}.index.json" for suffix in WEIGHT_SUFFIXES)
_NUMBERED_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,6})-of-(?P<count>[0-9]{1,6})\.safetensors")
_OWN_CONFIGS = (CONFIG, "params.json", "model_index.json", ADAPTER_CONFIG)
"""A folder that holds one of these beside weights is a checkpoint of its own."""
SECOND_COPY = "a second copy of the weights, in Mistral's form"
"""Why such a file is left out."""
_SECOND_COPY = re.compile(r"consolidated(-[0-9]+-of-[0-9]+)?\.safetensors")
"""Mistral's repositories hold the weights once more, under other names, in files of these names."""
_MISTRALS_NAMES = re.compile(r"layers\.[0-9]+\..+|tok_embeddings\.weight")


def _top_level(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(SAFETENSORS) and "/" not in name)


def top_shards(where: str, names: Iterable[str]) -> list[str]:
    """Return the files that may be shards of a checkpoint without an index: every safetensors file at its top, as
    vLLM reads it.

    Raises:
        SourceError: if there are none, or only a LoRA adapter's.
    """
    known = list(names)
    top = _top_level(known)
    adapter_only = all(name.startswith("adapter_model") for name in top)
    if top and not adapter_only:
        return top
    found = recognise(known, "Is the download complete?")
    what = "has no safetensors files of a model" if top else "has no safetensors files"
    raise SourceError(f"{what}{found.what}", where=where, next_step=found.next_step)


def without_second_copy(where: str, headers: Mapping[str, ShardHeader]) -> dict[str, ShardHeader]:
    """Return the headers of the shards of a checkpoint without an index, given those of all its safetensors files.

    A second copy of the weights in Mistral's own files and names is left out, if there are others.

    Raises:
        SourceError: if the shards' own numbering has gaps.
    """
    copies = {name for name in headers if _SECOND_COPY.fullmatch(name)}
    shards = {name: header for name, header in headers.items() if name not in copies}
    if not shards or not _is_second_copy([headers[name] for name in copies], shards.values()):
        shards = dict(headers)
    _check_numbers(where, list(shards))
    return shards


def _is_second_copy(copies: Iterable[ShardHeader], shards: Iterable[ShardHeader]) -> bool:
    """Return whether files hold tensors that others hold too: under Mistral's names, or under the same ones."""
    known = {record.name for header in shards for record in header.tensors}
    names = {record.name for header in copies for record in header.tensors}
    return names <= known or any(_MISTRALS_NAMES.fullmatch(name) for name in names - known)


def _check_numbers(where: str, names: list[str]) -> None:
    """Check the shards' own numbering: without an index it is all that tells whether one is missing."""
    numbered = [match for name in names if (match := _NUMBERED_SHARD.fullmatch(name))]
    for stem, count in sorted({(match["stem"], match["count"]) for match in numbered}):
        there = {int(match["number"]) for match in numbered if (match["stem"], match["count"]) == (stem, count)}
        # some writers number from 0
        missing = sorted(set(range(0 if 0 in there else 1, int(count) + (0 not in there))) - there)
        if missing:
            raise SourceError(
                f"{len(missing)} of {int(count)} shards are missing: number {first_of(missing, 5)}",
                where=f"{where.rstrip('/')}/{stem}-*-of-{count}.safetensors",
                next_step="Complete the download.",
            )


def check_weight_map(where: str, weight_map: object, names: Iterable[str]) -> Mapping[str, str]:
    """Return an index's map of tensors to shards.

    Args:
        where: the index, for errors.
        weight_map: as it was parsed.
        names: of the files that are there.

    Raises:
        SourceError: if it is not such a map, or names files that are not beside the index.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(
            "has no weight_map", where=where, next_step="It is not the index of a checkpoint: replace or remove it."
        )
    named = {shard if isinstance(shard, str) else None for shard in weight_map.values()}
    unsafe = {shard for shard in named if shard is None or "/" in shard or not is_safe_name(shard)}
    for tensor, shard in weight_map.items() if unsafe else ():
        if not isinstance(shard, str) or shard in unsafe:
            raise SourceError(
                f"unsafe file name for tensor {quoted(tensor)}",
                where=where,
                expected="the name of a file beside the index",
                actual=repr(shard)[:200],
            )
    known = set(names)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in known]
    if missing:
        raise _missing_error(where, missing, len(shards), sorted(set(_top_level(known)) - set(shards)))
    return weight_map


def _missing_error(where: str, missing: list[str], of: int, unlisted: list[str]) -> SourceError:
    what = f"names {len(missing)} of {of} files that do not exist: {first_of(missing, 5)}"
    if not unlisted:
        return SourceError(what, where=where, next_step="Complete the download.")
    return SourceError(
        f"{what}; and does not name files that do: {first_of(unlisted, 5)}",
        where=where,
        next_step="The index seems left over from an earlier export: replace it by the one that belongs to the files,"
        " or remove it (without an index every *.safetensors file is read). Or complete the download.",
    )


def split_files(
    files: Mapping[str, SourceFile], shards: Iterable[str]
) -> tuple[tuple[SourceFile, ...], dict[str, str]]:
    """Return the files that are copied unchanged, and the names of those that are left out, each with the reason.

    A checkpoint in a subfolder (a draft model, the original weights) is left out whole: half of it would be no use.
    """
    replaced = {CONFIG, HF_QUANT_CONFIG, INDEX, README, MANIFEST, *shards}
    apart = _checkpoint_folders(files)
    side: list[SourceFile] = []
    left_out: dict[str, str] = {}
    for name, file in files.items():
        if name in replaced:
            continue
        if any(str(parent) in apart for parent in PurePosixPath(name).parents):
            left_out[name] = "not of this model"
        elif name.endswith((*WEIGHT_SUFFIXES, *_INDEX_SUFFIXES)):
            left_out[name] = _why_left_out(name)
        else:
            side.append(file)
    return tuple(side), left_out


def _why_left_out(name: str) -> str:
    if name.endswith(_INDEX_SUFFIXES):
        return f"an index that servers do not read; {INDEX} is the one that counts"
    if not name.endswith(SAFETENSORS):
        return "not safetensors"
    if "/" in name:
        return "in a subfolder, where servers do not look for weights"
    return "not in the index"


def _checkpoint_folders(names: Iterable[str]) -> set[str]:
    """Return subfolders that are checkpoints of their own: for each file of weights the nearest with a config."""
    known = set(names)
    found = set()
    for name in known:
        if not name.endswith(WEIGHT_SUFFIXES):
            continue
        folders = [str(parent) for parent in PurePosixPath(name).parents][:-1]  # the last one is the top itself
        own = (folder for folder in folders if any(f"{folder}/{config}" in known for config in _OWN_CONFIGS))
        folder = next(own, None)
        if folder is not None:
            found.add(folder)
    return found
