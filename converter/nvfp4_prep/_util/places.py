"""Places in the file system: whether one is inside another."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["overlaps"]


def overlaps(path: Path, directory: Path) -> bool:
    """Return whether a path is or lies in a directory, or would be above it, by name or through links and mounts.

    Args:
        path: need not exist.
        directory: exists, or nothing is in it.
    """
    root = directory.resolve()
    return any(
        place.is_relative_to(root) or root.is_relative_to(place) or _is_inside(place, root) or _is_inside(root, place)
        for place in (path.parent.resolve() / path.name, path.resolve())
    )


def _is_inside(place: Path, directory: Path) -> bool:
    with contextlib.suppress(OSError):
        known = directory.stat()
        for folder in (place, *place.parents):
            with contextlib.suppress(OSError):
                if os.path.samestat(known, folder.stat()):
                    return True
    return False
