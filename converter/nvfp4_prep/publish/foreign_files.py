"""Refusal of a repository that holds what belongs to no push of this tool: a server would load it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.contents import WEIGHT_SUFFIXES
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST, quoted
from nvfp4_prep.errors import TargetError
from nvfp4_prep.hub.listing import Snapshot
from nvfp4_prep.hub.snapshot_reader import SnapshotReader
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.publish.repository import RemoteRepository

__all__ = ["refuse_foreign", "refuse_strange"]


def refuse_foreign(remote: RemoteRepository, state: Snapshot, ours: Mapping[str, object]) -> frozenset[str]:
    """Raise unless the branch is empty, ours unfinished, or an older prepared checkpoint.

    Returns:
        the older checkpoint's files, by its manifest; empty if there is none.

    Raises:
        TargetError: if it holds another model's weights or config, or other files that ``verify`` would call foreign.
    """
    old: frozenset[str] = frozenset()
    if MANIFEST in state.files:
        reader = SnapshotReader(remote.api, state, remote.patience, threading.Event())
        old = frozenset(Manifest.from_bytes(reader.read_whole(state.files[MANIFEST]), MANIFEST).files)
    refuse_strange(remote, state, ours.keys() | old)
    return old


def refuse_strange(remote: RemoteRepository, state: Snapshot, known: Collection[str]) -> None:
    """Raise :class:`TargetError` if a branch has what ``verify`` would call foreign: servers may load it."""
    where = f"{state.repo_id}@{remote.revision}"
    strange = [name for name in state.visible if name not in known and name != MANIFEST]
    model = [name for name in strange if name.endswith(WEIGHT_SUFFIXES)]
    if CONFIG in state.files and MANIFEST not in state.files:
        model.append(CONFIG)
    if model:
        raise TargetError(
            f"holds another model ({first_of(map(quoted, model), 1)})",
            where=where,
            next_step="Push to a new repository, or to a new branch of an empty one.",
        )
    if strange:
        some = first_of(map(quoted, strange), 1)
        raise TargetError(
            f"holds files that do not belong to this checkpoint ({some}): whoever serves it may load them",
            where=where,
            next_step="Delete them there, or push to a new repository. Nothing was published.",
        )
