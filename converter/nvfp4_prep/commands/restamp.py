"""Restamp: keep edits of a prepared checkpoint's ``config.json`` by recording them in its manifest.

Served fleets edit configs: rope scaling, EOS tokens, context lengths. The stamp must stay as it is; everything beside
it may change. Only the manifest is written, in one rename, so a run that is killed leaves the old or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep._util.arguments import PATH, checked
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.checkpoint.index import TEXT_MAX_NBYTES
from nvfp4_prep.checkpoint.small_files import MAX_SMALL_NBYTES
from nvfp4_prep.errors import BusyError, TargetError, VerificationError
from nvfp4_prep.moe.activation import Activation
from nvfp4_prep.moe.config_fit import fit_config
from nvfp4_prep.moe.discovery import FoundLayers
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.target_lock import no_locks_error
from nvfp4_prep.output.target_root import sync_folder
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.config_edits import edits_to_json
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.manifest_values import MADE
from nvfp4_prep.prepared.problems import Problems
from nvfp4_prep.prepared.served_config import FOREIGN_CODE, STAMP, ServedConfig, read_served_config
from nvfp4_prep.prepared.structure import check_structure, raise_damaged

__all__ = ["RestampResult", "restamp"]

_NEW = f".{MANIFEST}.new"
"""Written first, then renamed. Hidden: a leftover is not part of the checkpoint, and the next run takes it over."""


@dataclass(frozen=True)
class RestampResult:
    """The outcome of a restamp.

    Attributes:
        path: the checkpoint.
        edits: keys of ``config.json`` that differ from what was converted, as the manifest records them now.
        written: whether the manifest had to be changed.
    """

    path: Path
    edits: tuple[str, ...]
    written: bool


@checked(checkpoint=PATH)
def restamp(checkpoint: str | Path) -> RestampResult:
    """Record the edits of a prepared checkpoint's ``config.json`` in its manifest.

    ``verify`` passes afterwards and names the edits, ``relayout`` keeps them, ``restore`` still gives back the source's
    own config. A config that was put back loses its record. The config itself is not written.

    Args:
        checkpoint: a directory that ``convert`` wrote.

    Raises:
        CheckpointError, VerificationError: if it is not a prepared checkpoint, if its stamp was edited, if an edit
            names code to be loaded, or if anything but the config is not as the manifest says.
        TargetError, BusyError, NoSpaceError: if the manifest cannot be written.
    """
    with PreparedCheckpoint.open(checkpoint) as opened:
        found = read_served_config(opened)
        _check(opened, found)
        raw = opened.read_file(MANIFEST)
        new = _recorded(opened.read_json(MANIFEST), found)
        path = opened.path / MANIFEST
        _check_readable(opened, new)
        written = new != raw
        if written:
            _replace(path, new)
        return RestampResult(opened.path, tuple(edit.name for edit in found.edits), written)


_PUT_BACK = "Put it back as it was, or convert a source with that config."


def _check(checkpoint: PreparedCheckpoint, found: ServedConfig) -> None:
    """Raise :class:`VerificationError` for anything that recording the edits would not mend."""
    if found.stamp:
        raise VerificationError(
            f"its stamp was edited: {', '.join(found.stamp)}",
            where=str(checkpoint.path / CONFIG),
            next_step=STAMP,
        )
    if found.code:
        raise VerificationError(
            f"was edited to load code: {', '.join(found.code)}",
            where=str(checkpoint.path / CONFIG),
            next_step=FOREIGN_CODE,
        )
    _check_fits(checkpoint, found.config)
    problems = Problems()
    check_structure(checkpoint, problems, with_config=False)
    raise_damaged(checkpoint, problems)


def _check_fits(checkpoint: PreparedCheckpoint, served: Mapping[str, Any]) -> None:
    """Raise :class:`VerificationError` if the config now says of the experts what their tensors are not."""
    place = str(checkpoint.path / CONFIG)
    records = checkpoint.manifest.layers
    fitted = fit_config(FoundLayers(tuple(record.source for record in records), ()), _without_stamp(served))
    for record in records:
        now = fitted.activations.get(record.source.experts_path, record.activation)
        if (now.kind, now.clamp) != (record.activation.kind, record.activation.clamp):
            raise VerificationError(
                f"was edited to another activation than the experts of {record.source.experts_path} were prepared for",
                where=place,
                expected=_shown(record.activation),
                actual=_shown(now),
                next_step=_PUT_BACK,
            )
    for finding in fitted.others:
        raise VerificationError(f"was edited against the tensors: {finding.reason}", where=place, next_step=_PUT_BACK)


def _without_stamp(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of the model: the stamp is compared by itself."""
    return {
        key: _without_stamp(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _shown(activation: Activation) -> str:
    clamp = "" if activation.clamp is None else f" clamped at {activation.clamp:g}"
    return f"{activation.spelled or activation.kind.value}{clamp}"


def _check_readable(checkpoint: PreparedCheckpoint, manifest: bytes) -> None:
    """Raise :class:`VerificationError` if no reader would take what would be written, or the config beside it."""
    Manifest.from_bytes(manifest, str(checkpoint.path / MANIFEST))
    sizes = ((CONFIG, checkpoint.sizes[CONFIG], TEXT_MAX_NBYTES[CONFIG]), (MANIFEST, len(manifest), MAX_SMALL_NBYTES))
    for name, nbytes, most in sizes:
        if nbytes > most:
            raise VerificationError(
                "is too large to be read again, with these edits",
                where=str(checkpoint.path / name),
                expected=f"at most {most:,} bytes",
                actual=f"{nbytes:,} bytes",
                next_step=f"Make {CONFIG} smaller.",
            )


def _recorded(manifest: dict[str, Any], found: ServedConfig) -> bytes:
    """Return the manifest's text with the edits and the config's digest; keys of a later version stay."""
    manifest.pop("config_edits", None)
    if found.edits:
        manifest["config_edits"] = edits_to_json(found.edits)
    record = manifest["files"].get(CONFIG, {})
    manifest["files"][CONFIG] = {**record, "nbytes": found.nbytes, "sha256": found.sha256, "kind": MADE}
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _replace(path: Path, data: bytes) -> None:
    if path.is_symlink():
        raise TargetError(
            "is a symbolic link, which restamp would replace",
            where=str(path),
            next_step="Copy the checkpoint (cp -rL) and restamp the copy.",
        )
    try:
        with _new_file(path) as descriptor:
            os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            os.ftruncate(descriptor, 0)
            with open(descriptor, "wb", closefd=False) as stream:
                stream.write(data)
            os.fsync(descriptor)
            (path.parent / _NEW).rename(path)
            sync_folder(path.parent)
    except OSError as error:
        raise translate_os_error(error, path) from error


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Open the file that takes the manifest's place, locked; removed again if the work fails."""
    new = path.parent / _NEW
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(new, flags, 0o600)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise TargetError(
                "is not a regular file with this one name, so it is none of restamp's",
                where=str(new),
                next_step="Remove it.",
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError("another restamp is at work", where=str(path.parent), next_step="Wait for it.") from error
        except OSError as error:
            refusal = no_locks_error(error, path.parent)
            if refusal is None:
                raise
            new.unlink(missing_ok=True)  # nobody else can hold it
            raise refusal from error
        if not _same(descriptor, new):
            raise BusyError("another restamp has just finished", where=str(path.parent), next_step="Look at it.")
        try:
            yield descriptor
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    finally:
        os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    """Return whether a name still belongs to an open file: another run may have renamed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
