"""The one file that a user may name for the command line to write: a report, which never takes another file's place."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from nvfp4_prep._util.places import overlaps
from nvfp4_prep.checkpoint.filenames import CONFIG, INDEX, MANIFEST, WORK_FOLDER
from nvfp4_prep.errors import UsageError
from nvfp4_prep.output.exclusive_rename import rename_new

__all__ = ["REPORT_MARKER", "check_place", "check_report_path", "write_report"]

REPORT_MARKER = "<meta name='generator' content='nvfp4-prep report'>"
"""Stands at the beginning of every report: a file with it may be replaced by the next report."""

_BEGINNING = b"<!doctype html>"
_OLDER_BEGINNING = b"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Fused-MoE smoke run: "
_HEAD_NBYTES = 4096


def check_report_path(path: Path, *directories: str | Path | None) -> None:
    """Refuse a path that a report must not be written to; writes nothing.

    Args:
        path: what the user named.
        directories: checkpoints that nothing is added to, whether they exist or not; Hub ids and None are passed over.

    Raises:
        UsageError: if the path lies in one of them, is taken by anything but an earlier report, or cannot be written.
    """
    try:
        _check_path(path, directories)
    except OSError as error:
        raise _refused(path, f"cannot be written ({error.strerror})") from error


def check_place(path: Path, directories: Iterable[str | Path | None], option: str) -> None:
    """Refuse a path that no file may be added at, whatever is there; arguments as for :func:`check_report_path`.

    Args:
        path, directories: see there.
        option: that named the path.

    Raises:
        UsageError: if it lies in a checkpoint or a directory that does not exist.
        OSError: if the system does not let one look.
    """
    if not path.parent.is_dir():
        raise _refused(path, "its directory does not exist", option)
    if _is_checkpoint(path.parent):
        raise _refused(path, "lies in a checkpoint, to which nothing is added", option)
    for directory in directories:
        if directory is not None and overlaps(path, Path(directory)):
            raise _refused(path, f"is part of {directory}, to which nothing is added", option)


def _check_path(path: Path, directories: Iterable[str | Path | None]) -> None:
    check_place(path, directories, "--report")
    if not _is_free(path) and not _is_report(path):
        raise _refused(path, "exists and is not a report of nvfp4-prep: nothing is overwritten")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _refused(path, "cannot be written")


def write_report(path: Path, text: str, *directories: str | Path | None) -> None:
    """Write a report whole or not at all, after another look at its path; arguments as for :func:`check_report_path`.

    Raises:
        UsageError: as :func:`check_report_path`, also for a file that appeared meanwhile.
        NoSpaceError, TargetError: if the disk is full or fails.
    """
    check_report_path(path, *directories)
    try:
        _write_whole(path, text)
    except OSError as error:
        from nvfp4_prep.output.atomic_file import translate_os_error  # needs torch, and --help does not

        failure = translate_os_error(error, path)
        failure.next_step = "Give another path for the report. What it reports on is as it was."
        raise failure from error


def _write_whole(path: Path, text: str) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    begun, older = (f".nvfp4-prep-report-{secrets.token_hex(8)}" for _ in range(2))
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(begun, flags, 0o666, dir_fd=folder)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if not _is_free(path):
            _put_aside(path, older, folder)
        rename_new(begun, path.name, folder, folder)
        os.fsync(folder)
    except FileExistsError as error:
        raise _refused(path, "appeared meanwhile: nothing is overwritten") from error
    finally:
        for name in (begun, older):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
        os.close(folder)


def _put_aside(path: Path, older: str, folder: int) -> None:
    """Move an earlier report away; what took its place since it was looked at is moved back."""
    with contextlib.suppress(FileNotFoundError):
        rename_new(path.name, older, folder, folder)
        if not _is_report(path.parent / older):
            rename_new(older, path.name, folder, folder)
            raise _refused(path, "exists and is not a report of nvfp4-prep: nothing is overwritten")


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a directory is a checkpoint, or one in work."""
    names = {entry.name for entry in os.scandir(folder)}
    return not names.isdisjoint({MANIFEST, WORK_FOLDER, INDEX}) or (
        CONFIG in names and any(name.endswith(".safetensors") for name in names)
    )


def _is_free(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        path.lstat()
        return False
    return True


def _is_report(path: Path) -> bool:
    """Return whether a regular file, not a link to one, begins as a report."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        head = os.read(descriptor, _HEAD_NBYTES)
    finally:
        os.close(descriptor)
    return head.startswith(_BEGINNING) and (REPORT_MARKER.encode() in head or head.startswith(_OLDER_BEGINNING))


def _refused(path: Path, what: str, option: str = "--report") -> UsageError:
    return UsageError(f"{option}: {what}", where=str(path), next_step="Give another path.")
