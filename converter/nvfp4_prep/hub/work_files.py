"""Files and folders of our own in the folder of downloads: never links, which would lead out of it."""

from __future__ import annotations

from pathlib import Path

from nvfp4_prep.errors import TargetError

__all__ = ["partial_path", "refuse_link"]


def partial_path(target: Path) -> Path:
    """Return where a file lies while it is fetched."""
    return target.with_name(target.name + ".part")


def refuse_link(path: Path) -> None:
    """Raise :class:`TargetError` for a link where only files and folders of our own may lie: it leads elsewhere."""
    if path.is_symlink():
        raise TargetError(
            "is a symbolic link; downloads are written to no other place",
            where=str(path),
            next_step="Remove the link and run the same command again.",
        )
