"""Who looked at a checkpoint, when, where and with what: the part of a report that an audit asks for first."""

from __future__ import annotations

import datetime
import hashlib
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

from nvfp4_prep._util.installed import installed_versions
from nvfp4_prep.checkpoint.filenames import MANIFEST

__all__ = ["Evidence", "collect_evidence", "manifest_digest"]


@dataclass(frozen=True)
class Evidence:
    """The circumstances of a report.

    Attributes:
        command: what was typed; empty for a call from Python.
        host: name of the machine.
        system: kernel and processor architecture.
        date: ISO 8601 in UTC, to the second.
        versions: of this tool, Python, the packages and the servers; empty where one is not installed.
        manifest_sha256: digest of ``nvfp4_prep.json``; empty if there is no such file.
    """

    command: str
    host: str
    system: str
    date: str
    versions: dict[str, str]
    manifest_sha256: str


def collect_evidence(command: str, manifest_sha256: str) -> Evidence:
    """Return the circumstances as they are now."""
    return Evidence(
        command=command,
        host=socket.gethostname(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=installed_versions(),
        manifest_sha256=manifest_sha256,
    )


def manifest_digest(checkpoint: str | Path) -> str:
    """Return the sha256 of a directory's manifest, or an empty text if it has none."""
    path = Path(checkpoint) / MANIFEST
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
