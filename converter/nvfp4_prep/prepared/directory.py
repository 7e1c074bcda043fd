"""Directories that are not complete prepared checkpoints: what they are instead, and what to do."""

from __future__ import annotations

import os
from pathlib import Path

from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, parse_json
from nvfp4_prep.checkpoint.entry_kind import entry_kind, kind_step
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST, WORK_FOLDER
from nvfp4_prep.checkpoint.small_files import read_small_file
from nvfp4_prep.errors import CheckpointError, NvfpPrepError, SourceError
from nvfp4_prep.output.target_checks import PARTS_FOLDER, has_journal
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep.prepared.stamp import stamp_in

__all__ = ["odd_manifest", "refusal_of"]

_NO_CHECKPOINT = f"is not a prepared checkpoint (no {MANIFEST})"
_GIVE = "Give the directory of a prepared checkpoint."
_MAKE = "Make one with nvfp4-prep convert, or, if it was one, copy or download the whole checkpoint."
_CONTINUE = "Repeat the command that was stopped: it continues."
_JOIN = "Make the parts that are missing, then run the same convert command with --join in the place of --layers."


def refusal_of(path: Path, *, in_work: bool = False, absent: type[NvfpPrepError] = SourceError) -> NvfpPrepError | None:
    """Return what keeps a directory from being opened as a prepared checkpoint; ``None`` if it has a manifest.

    Args:
        path: as the user gave it.
        in_work: whether the run that writes it may still be at work.
        absent: type of the error for what does not exist or cannot be read, which is no verdict on a checkpoint.
    """
    where = str(path)
    try:
        unfinished = has_journal(path) and not in_work
        if (path / MANIFEST).is_file() and not unfinished:
            return None
    except OSError as error:  # a folder that may not be entered, a name too long
        return absent(f"cannot be read ({error.strerror})", where=where)
    if not os.path.lexists(path):  # a typing error or a disk that is not mounted
        return absent("does not exist", where=where, next_step=_GIVE)
    if not path.is_dir():
        return CheckpointError("is not a directory", where=where, next_step=_GIVE)
    if not unfinished and (path / WORK_FOLDER / PARTS_FOLDER).is_dir():
        return CheckpointError("holds parts of a conversion that are not joined", where=where, next_step=_JOIN)
    if unfinished or (path / WORK_FOLDER).is_dir():
        return CheckpointError("holds an unfinished run", where=where, next_step=_CONTINUE)
    if (odd := odd_manifest(path)) is not None:
        return CheckpointError(odd[0], where=where, next_step=odd[1])
    below = sorted(manifest.parent.name for manifest in path.glob(f"*/{MANIFEST}"))
    step = f"Give the folder: …/{below[0][:200]}." if below else _MAKE
    return CheckpointError(_NO_CHECKPOINT, where=where, next_step=step)


def odd_manifest(path: Path) -> tuple[str, str] | None:
    """Return what is wrong, and the next step, where a directory shows that it is a prepared checkpoint and has no file
    as its manifest; ``None`` if it has one, or shows nothing of the kind.
    """
    if (path / MANIFEST).is_file():
        return None
    kind = entry_kind(path / MANIFEST)
    step = kind_step(kind, renewal(MANIFEST))
    if kind != "nothing":
        return f"has a {MANIFEST} that is not a regular file ({kind})", step
    return (f"is a prepared checkpoint without its {MANIFEST}", step) if _has_stamp(path) else None


def _has_stamp(path: Path) -> bool:
    try:
        raw = read_small_file(path / CONFIG, CheckpointError)
        config = parse_json(raw, CONFIG, CheckpointError, max_depth=MAX_DEPTH)
    except NvfpPrepError:
        return False
    return isinstance(config, dict) and stamp_in(config) is not None
