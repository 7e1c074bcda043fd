"""Directories that are not complete prepared checkpoints: what they are instead, and what to do."""

from __future__ import annotations

import os
from pathlib import Path

from nvfp4_prep.checkpoint.filenames import MANIFEST, WORK_FOLDER
from nvfp4_prep.errors import CheckpointError, NvfpPrepError, SourceError
from nvfp4_prep.output.target_checks import PARTS_FOLDER, has_journal

__all__ = ["refusal_of"]

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
    if os.path.lexists(path / MANIFEST):
        what = f"has a {MANIFEST} that is not a regular file"
        return CheckpointError(what, where=where, next_step="Remove it, or make it anew with convert.")
    below = sorted(manifest.parent.name for manifest in path.glob(f"*/{MANIFEST}"))
    step = f"Give the folder: …/{below[0][:200]}." if below else _MAKE
    return CheckpointError(f"is not a prepared checkpoint (no {MANIFEST})", where=where, next_step=step)
