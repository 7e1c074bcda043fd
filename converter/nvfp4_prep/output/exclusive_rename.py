"""Renaming to a name that nobody has: an entry that is there already is never replaced."""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["rename_new"]

_NOREPLACE = 1
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""What ``renameat2`` says where the system or the file system cannot rename without replacing."""
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


def rename_new(old: str, new: str, old_folder: int, new_folder: int) -> None:
    """Rename an entry between two open folders.

    Raises:
        FileExistsError: if there is an entry of the new name.
        OSError: whatever else the file system refuses.
    """
    problem = _renameat2(old, new, old_folder, new_folder)
    if problem in _NOT_HERE:
        _link_and_unlink(old, new, old_folder, new_folder)
    elif problem:
        raise OSError(problem, os.strerror(problem), new)


def _renameat2(old: str, new: str, old_folder: int, new_folder: int) -> int:
    """Return the number of the error, 0 if there was none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return errno.ENOSYS
    if call(old_folder, os.fsencode(old), new_folder, os.fsencode(new), ctypes.c_uint(_NOREPLACE)) == 0:
        return 0
    return ctypes.get_errno()


def _link_and_unlink(old: str, new: str, old_folder: int, new_folder: int) -> None:
    try:
        os.link(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links either: look, then rename. Somebody who creates the file in between loses it.
        if os.path.lexists(f"/proc/self/fd/{new_folder}/{new}"):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from error
        os.rename(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)
    else:
        os.unlink(old, dir_fd=old_folder)
