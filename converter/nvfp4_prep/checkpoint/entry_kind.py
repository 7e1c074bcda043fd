"""Kinds of directory entries in words, for errors about what stands in the place of a file; and what helps."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nvfp4_prep.checkpoint.lfs_pointer import LFS_MAX_NBYTES, LFS_NEXT_STEP, is_lfs_pointer
from nvfp4_prep.checkpoint.local_files import regular_descriptor

__all__ = ["FILE", "LINK", "LINK_STEP", "entry_kind", "kind_step"]

LINK_STEP = (
    "Put the file itself in its place (cp -rL copies a whole checkpoint so), or remove it if it does not belong there."
)
FILE, LINK, _POINTER = "a file", "a symbolic link", "a git-lfs pointer"
_KINDS = {
    stat.S_IFLNK: LINK,
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def entry_kind(path: Path) -> str:
    """Return what an entry is, of a link the link itself: "a file", "a FIFO", "a git-lfs pointer", or "nothing"."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return _KINDS.get(stat.S_IFMT(status.st_mode), "another kind of file")
        if status.st_size > LFS_MAX_NBYTES:
            return FILE
        with open(regular_descriptor(path, follow_links=False), "rb") as stream:
            return _POINTER if is_lfs_pointer(stream.read(LFS_MAX_NBYTES)) else FILE
    except FileNotFoundError:
        return "nothing"
    except OSError:  # it may not be read, or another one has taken its place
        return FILE if os.path.lexists(path) else "nothing"


def kind_step(kind: str, renewal: str) -> str:
    """Return the next step where an entry of this kind stands in the place of a file of a checkpoint.

    Args:
        kind: of :func:`entry_kind`.
        renewal: the next step for a file that is damaged or missing.
    """
    if kind == _POINTER:
        return LFS_NEXT_STEP
    if kind == LINK:
        return LINK_STEP
    return renewal if kind in (FILE, "nothing") else f"Remove it. {renewal}"
