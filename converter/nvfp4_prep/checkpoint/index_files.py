"""Which files of a checkpoint are its shards, which are copied, and which are no part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from nvfp4_prep.checkpoint.filenames import CONFIG, HF_QUANT_CONFIG, INDEX, MANIFEST, README, is_safe_name, quoted
from nvfp4_prep.checkpoint.source import SourceFile
from nvfp4_prep.errors import SourceError

__all__ = ["WEIGHT_SUFFIXES", "check_weight_map", "other_format", "shards_without_index", "split_files"]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
"""Files of weights, in whatever format, end so."""
_INDEX_SUFFIXES = tuple(f"{suffix}.index.json" for suffix in WEIGHT_SUFFIXES)
_NUMBERED_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,6})-of-(?P<count>[0-9]{1,6})\.safetensors")
_OWN_CONFIGS = (CONFIG, "params.json", "model_index.json", "adapter_config.json")
"""A folder that holds one of these beside weights is a checkpoint of its own."""
_SECOND_COPY = "consolidated"
"""Mistral's repositories hold the weights once more under other names, in files whose names begin so."""
_OTHER_FORMATS = {
    ".gguf": ("GGUF", "A GGUF repository cannot be prepared: give the NVFP4 checkpoint in safetensors files."),
    ".bin": ("PyTorch .bin", "Only safetensors can be prepared: give a checkpoint that was published as such."),
    ".pth": ("PyTorch .pth", "Only safetensors can be prepared: give a checkpoint that was published as such."),
    ".pt": ("PyTorch .pt", "Only safetensors can be prepared: give a checkpoint that was published as such."),
}


def other_format(names: Iterable[str]) -> tuple[str, str | None]:
    """Return, of a checkpoint without safetensors, the end of a sentence that names its format, and the next step."""
    known = sorted(names)
    if any(name.endswith(".safetensors") for name in known):
        return "", None
    for suffix, (form, next_step) in _OTHER_FORMATS.items():
        found = [name for name in known if name.endswith(suffix)]
        if found:
            more = f" and {len(found) - 1} more" if found[1:] else ""
            return f": its weights are {form} files ({found[0]}{more}), not safetensors", next_step
    return "", None


def _top_level(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)


def shards_without_index(where: str, names: Iterable[str]) -> list[str]:
    """Return the shards of a checkpoint that has no index: every safetensors file at its top, as vLLM reads it.

    Raises:
        SourceError: if there are none, or the shards' own numbering has gaps.
    """
    known = list(names)
    top = _top_level(known)
    if not top:
        what, next_step = other_format(known)
        raise SourceError(
            f"has no safetensors files{what}", where=where, next_step=next_step or "Is the download complete?"
        )
    shards = [name for name in top if not name.startswith(_SECOND_COPY)] or top
    _check_numbers(where, shards)
    return shards


def _check_numbers(where: str, names: list[str]) -> None:
    """Without an index, the shards' own numbering is all that tells whether one is missing."""
    numbered = [match for name in names if (match := _NUMBERED_SHARD.fullmatch(name))]
    for stem, count in sorted({(match["stem"], match["count"]) for match in numbered}):
        there = {int(match["number"]) for match in numbered if (match["stem"], match["count"]) == (stem, count)}
        # some writers number from 0
        missing = sorted(set(range(0 if 0 in there else 1, int(count) + (0 not in there))) - there)
        if missing:
            raise SourceError(
                f"{len(missing)} of {int(count)} shards are missing: number {', '.join(map(str, missing[:5]))}"
                + (" …" if len(missing) > 5 else ""),
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
        SourceError: if it is no such map, or names files that are not beside the index.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(
            "has no weight_map", where=where, next_step="It is no index of a checkpoint: replace or remove it."
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
    what = f"names {len(missing)} of {of} files that do not exist: {_some(missing)}"
    if not unlisted:
        return SourceError(what, where=where, next_step="Complete the download.")
    return SourceError(
        f"{what}; and does not name files that do: {_some(unlisted)}",
        where=where,
        next_step="The index seems left over from an earlier export: replace it by the one that belongs to the files,"
        " or remove it (without an index every *.safetensors file is read). Or complete the download.",
    )


def _some(names: list[str]) -> str:
    return ", ".join(name[:200] for name in names[:5]) + (" …" if len(names) > 5 else "")


def split_files(
    files: Mapping[str, SourceFile], shards: Iterable[str]
) -> tuple[tuple[SourceFile, ...], tuple[str, ...]]:
    """Return the files that are copied unchanged, and the names of those that are left out.

    A checkpoint in a subfolder (a draft model, the original weights) is left out whole: half of it would be no use.
    """
    replaced = {CONFIG, HF_QUANT_CONFIG, INDEX, README, MANIFEST, *shards}
    apart = _checkpoint_folders(files)
    side, left_out = [], []
    for name, file in files.items():
        if name in replaced:
            continue
        inside = any(str(parent) in apart for parent in PurePosixPath(name).parents)
        if inside or name.endswith((*WEIGHT_SUFFIXES, *_INDEX_SUFFIXES)):
            left_out.append(name)
        else:
            side.append(file)
    return tuple(side), tuple(left_out)


def _checkpoint_folders(names: Iterable[str]) -> set[str]:
    """Subfolders that are checkpoints of their own: of every file of weights, the nearest folder with a config."""
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
