"""Pointers that git-lfs leaves in the place of files in a clone that was made without it."""

from __future__ import annotations

__all__ = ["LFS_MAGIC", "LFS_MAX_NBYTES", "LFS_NEXT_STEP", "is_lfs_pointer"]

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
LFS_MAX_NBYTES = 1024
"""A pointer is smaller than this, by git-lfs's specification."""
LFS_NEXT_STEP = "Run `git lfs install` and `git lfs pull` in the clone, or download the checkpoint with `hf download`."


def is_lfs_pointer(content: bytes) -> bool:
    """Return whether a file with this beginning is a pointer."""
    return content.startswith(LFS_MAGIC)
