"""Files and folders of our own in the folder of downloads: never links, which would lead out of it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from nvfp4_prep.errors import TargetError

__all__ = ["open_partial", "partial_path", "refuse_link", "remove_tree"]


def partial_path(target: Path) -> Path:
    """Where a file lies while it is fetched."""
    return target.with_name(target.name + ".part")


def refuse_link(path: Path) -> None:
    """Raise :class:`TargetError` for a link where only files and folders of our own may lie: it leads elsewhere."""
    if path.is_symlink():
        raise TargetError(
            "is a symbolic link; downloads are written to no other place",
            where=str(path),
            next_step="Remove the link and run the same command again.",
        )


def open_partial(path: Path) -> BinaryIO:
    """Open a partial file for appending, never through a link and never anything but a regular file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TargetError("is not a regular file", where=str(path), next_step="Remove it.")
    return os.fdopen(descriptor, "ab+")


def remove_tree(folder: Path) -> None:
    """Delete a folder of our own making; nothing happens where there is none."""
    shutil.rmtree(folder, ignore_errors=True)
