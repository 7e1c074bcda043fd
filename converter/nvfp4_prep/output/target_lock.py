"""The lock that keeps two runs on one target apart. Where a file system has none, nothing is written."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import BusyError, TargetError
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["LOCK", "check_idle", "check_locks", "no_locks_error", "take_lock"]

LOCK = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def check_locks(path: Path) -> None:
    """Raise :class:`TargetError` if the file system that a target lies or will lie on has no locks; only look."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        descriptor = os.open(existing, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return  # whoever writes there says why not
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        refusal = no_locks_error(error, path)
        if refusal is not None:
            raise refusal from error
    finally:
        os.close(descriptor)


def check_idle(path: Path) -> None:
    """Raise :class:`BusyError` if a run holds the target, or :class:`TargetError` if no run could; only look."""
    check_locks(path)
    try:
        with TargetRoot.open(path) as root:
            descriptor = root.open_file(f"{WORK_FOLDER}/{LOCK}", os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(path) from error
    except OSError as error:
        refusal = no_locks_error(error, path)
        if refusal is None:
            raise
        raise refusal from error
    finally:
        os.close(descriptor)


def take_lock(root: TargetRoot) -> int:
    """Return the descriptor that holds the lock of a target.

    Raises:
        BusyError: if another run holds it, or has just finished.
        TargetError: if the file system has no locks.
        OSError: if the lock's file cannot be made.
    """
    descriptor = root.open_file(f"{WORK_FOLDER}/{LOCK}", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise _busy(root.path) from error
        refusal = no_locks_error(error, root.path)
        if refusal is None:
            raise
        root.unlink(f"{WORK_FOLDER}/{LOCK}")
        raise refusal from error
    if os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        raise BusyError("another run has just finished this target", where=str(root.path), next_step="Look at it.")
    return descriptor


def _busy(path: Path) -> BusyError:
    return BusyError("another run writes to this target", where=str(path), next_step="Wait for it, or stop it.")


def no_locks_error(error: OSError, path: Path) -> TargetError | None:
    """Return what to say where a file system refused a lock because it has none; None for any other error."""
    if error.errno not in _NO_LOCKS:
        return None
    return TargetError(
        "the file system has no locks (flock), so nothing would keep a second run out",
        where=str(path),
        next_step="Mount it with locks (Lustre: -o flock), or give a target on another file system.",
    )
