"""The kind of storage under a file: local, or across a network."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["is_network_storage", "storage_of"]

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = (
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "daos",
    "fuse",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "smb",
    "wekafs",
)


def is_network_storage(device: int, mounts: Path = _MOUNTS) -> bool:
    """Return whether the file system of a device asks a network, or a process of its own (FUSE), for its pages.

    Args:
        device: ``st_dev`` of a file.
        mounts: table of mounts in the format of ``proc_pid_mountinfo(5)``.

    Returns:
        False where the system has no such table.
    """
    kind = _file_system(device, mounts)
    return kind is not None and kind.startswith(_NETWORK)


def storage_of(path: Path, mounts: Path = _MOUNTS) -> str:
    """Return the name of the file system under a path, with "across a network" where it is; "unknown" if not said."""
    kind = _file_system(path.stat().st_dev, mounts)
    if kind is None:
        return "unknown"
    return f"{kind}, across a network" if kind.startswith(_NETWORK) else kind


def _file_system(device: int, mounts: Path) -> str | None:
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields = before.split()
        if separator and len(fields) > 2 and fields[2] == number:
            return after.split(" ", 1)[0]
    return None
