"""A checkpoint on the Hub as a source of a conversion: shards ahead of their use, deleted after it."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_prep._util.system import open_files_error, start_thread
from nvfp4_prep.checkpoint.local_files import read_exactly
from nvfp4_prep.errors import HubError, SourceError, TargetError
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.listing import RemoteFile, hash_matches, is_git_id
from nvfp4_prep.hub.range_source import RangeSource, is_small
from nvfp4_prep.hub.work_files import partial_path, refuse_link
from nvfp4_prep.output.target_root import TargetRoot

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["SHARDS_AHEAD", "HubSource"]

SHARDS_AHEAD = 2
"""Room for downloads ahead of their use, in shards of the largest size."""
_GRACE_S = 2.0
"""Seconds that closing waits for transfers, which notice when their next bytes arrive."""


@dataclass
class _Shard:
    """A file on its way. States: waiting → fetching → ready or failed → released."""

    file: RemoteFile
    state: str = "waiting"
    path: Path | None = None
    is_ours: bool = False
    descriptor: int = -1
    error: BaseException | None = None


class HubSource(RangeSource):
    """A repository at one commit, planned by ranges like its parent; shards are downloaded, and checked as a whole.

    Shards come strictly in the scheduled order and stay until :meth:`release`; a download starts when it fits beside
    those that are there. The room, :meth:`room_nbytes`, is what the plan needs at once plus :data:`SHARDS_AHEAD`. That
    never blocks: everything before a shard that the earliest unfinished file waits for is itself in use by that file or
    later ones, so all of it fits. Files that the user's cache has are read there and never deleted; with
    ``keep_source`` everything is downloaded into that cache.

    Peak memory: 1 MiB a shard while planning, 10 MB a running download, 256 MiB of small files at the very most.
    """

    def __init__(
        self,
        address: HubAddress,
        *,
        work_dir: Path | None = None,
        keep_source: bool = False,
        ahead: int = SHARDS_AHEAD,
        patience: Patience | None = None,
        api: HfApi | None = None,
    ) -> None:
        """Resolve the revision and list the files.

        Args:
            address: what to read.
            work_dir: where shards lie while they are needed; created by :meth:`schedule`. Without one (``--dry-run``)
                only planning is possible, unless ``keep_source`` is set.
            keep_source: download into the user's cache and leave everything there.
            ahead: see :data:`SHARDS_AHEAD`.
            patience: how long network failures are endured.
            api: the official client; by default with the user's endpoint and token.

        Raises:
            HubError: if the repository or the revision is missing or closed, or the Hub cannot be reached.
        """
        super().__init__(address, patience=patience, api=api)
        self.work_dir = work_dir
        self.keep_source = keep_source
        self.ahead = max(ahead, 1)
        self._stop = self.downloader.stop
        self._changed = threading.Condition()
        self._slots = threading.Semaphore(self.ahead + 1)
        self._order: list[str] = []
        self._room = 0
        self._shards: dict[str, _Shard] = {}
        self._threads: list[threading.Thread] = []

    def schedule(self, shards: Sequence[str], at_once_nbytes: int = 0) -> None:
        """Start downloading, in this order; leftovers of an earlier run that are not in it are deleted."""
        with self._changed:
            self._heads.clear()
            self._order = list(shards)
            for name in shards:
                self._shards.setdefault(name, _Shard(self._remote(name)))
            self._room = self._room_for(shards, at_once_nbytes)
            self._tidy()
            self._pump()

    def room_nbytes(self, shards: Sequence[str], at_once_nbytes: int) -> int:
        """Return the disk space that downloads take at most; 0 where they go to the user's cache."""
        return 0 if self.keep_source else self._room_for(shards, at_once_nbytes)

    def _room_for(self, shards: Sequence[str], at_once_nbytes: int) -> int:
        largest = max((self._remote(name).nbytes for name in shards), default=0)
        return max(at_once_nbytes, largest) + self.ahead * largest

    def _tidy(self) -> None:
        if self.work_dir is None:
            return
        for folder in (self.work_dir, self.work_dir.parent):
            refuse_link(folder)
        if not self.work_dir.is_dir():
            return
        targets = [self._target(self._shards[name].file) for name in self._order]
        wanted = {path.name for target in targets for path in (target, partial_path(target))}
        with TargetRoot.open(self.work_dir) as held:
            for name in held.names():
                refuse_link(self.work_dir / name)
                status = held.status(name)
                if status is not None and (stat.S_ISDIR(status.st_mode) or name not in wanted):
                    held.remove_tree(name)

    def _target(self, file: RemoteFile) -> Path:
        if self.work_dir is None:
            raise SourceError("must be downloaded, and no place was given for it", where=f"{self.label}/{file.name}")
        name = file.sha256 or file.git_sha1
        if not is_git_id(name):  # checked where the listing was read, and here again: it becomes a path
            raise HubError("hash in the Hub's listing is malformed", where=f"{self.label}/{file.name}", actual=name)
        for folder in (self.work_dir, self.work_dir.parent):
            refuse_link(folder)
        return self.work_dir / name

    def _pump(self) -> None:
        """Start what fits, in order; call it with the lock held."""
        held = sum(shard.file.nbytes for shard in self._shards.values() if shard.state in ("fetching", "ready"))
        for shard in (self._shards[name] for name in self._order):
            if shard.state == "waiting":
                if held + shard.file.nbytes > self._room:
                    break
                self._start(shard)
                held += shard.file.nbytes

    def _start(self, shard: _Shard) -> None:
        shard.state = "fetching"
        thread = threading.Thread(target=self._run, args=(shard,), name=f"fetch {shard.file.name}", daemon=True)
        start_thread(thread)
        self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]

    def _run(self, shard: _Shard) -> None:
        try:
            with self._slots:
                if not self._stop.is_set():
                    self._obtain(shard)
        except BaseException as error:
            shard.error = error
        with self._changed:
            shard.state = "failed" if shard.error is not None else "ready"
            self._changed.notify_all()

    def _obtain(self, shard: _Shard) -> None:
        file = shard.file
        cached = self.downloader.cached(file)
        if cached is not None and hash_matches(file, cached):
            shard.path = cached
        elif self.keep_source:
            shard.path = self.downloader.fetch_to_cache(file)
        else:
            shard.path, shard.is_ours = self._target(file), True
            refuse_link(shard.path)
            if not (shard.path.is_file() and hash_matches(file, shard.path)):
                self.downloader.fetch(file, shard.path)
        follow = os.O_NOFOLLOW if shard.is_ours else 0  # the client's cache is made of links
        try:
            shard.descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | follow)
        except OSError as error:
            raise open_files_error(error, str(shard.path)) or SourceError(
                f"a downloaded file cannot be opened ({error.strerror})",
                where=str(shard.path),
                next_step="Did another program move it? The same command goes on from what is there.",
            ) from error
        self._check_seen(shard)

    def _check_seen(self, shard: _Shard) -> None:
        for (offset_bytes, nbytes), digest in self._seen.get(shard.file.name, {}).items():
            buffer = bytearray(nbytes)
            read_exactly(shard.descriptor, shard.file.name, offset_bytes, memoryview(buffer))
            if hashlib.sha256(buffer).digest() != digest:
                raise SourceError(
                    f"{nbytes} bytes at {offset_bytes}, from which the conversion was planned, arrived damaged",
                    where=f"{self.label}/{shard.file.name}",
                    next_step="Run the same command again.",
                )

    def read_into(self, file: str, offset_bytes: int, buffer: memoryview) -> None:
        """See :class:`nvfp4_prep.checkpoint.source.Source`. Waits until the file has arrived and its hash is right."""
        remote = self._remote(file)
        if file not in self._shards and is_small(remote):
            buffer[:] = self._whole(remote)[offset_bytes : offset_bytes + len(buffer)]
            return
        with self._changed:
            shard = self._shards.setdefault(file, _Shard(remote))
            if shard.state == "waiting" and file not in self._order:
                self._start(shard)
            while shard.state in ("waiting", "fetching") and not self._stop.is_set():
                self._changed.wait(0.5)
            if shard.state != "ready" and shard.error is None:
                raise HubError("download was stopped", where=file, next_step="Run the same command again.")
            if shard.error is not None:
                raise shard.error
            descriptor = shard.descriptor
        read_exactly(descriptor, file, offset_bytes, buffer)

    def will_read(self, file: str, offset_bytes: int, nbytes: int) -> None:
        """Do nothing: shards are downloaded ahead as a whole, and are in the page cache then."""

    def release(self, shard: str) -> None:
        """Delete the shard, unless it lies in the user's cache. Reading it again downloads it again."""
        with self._changed:
            known = self._shards.pop(shard, None)
            if known is None:
                return
            self._order = [name for name in self._order if name != shard]
            while known.state == "fetching":
                self._changed.wait()
            self._discard(known)
            self._pump()

    def _discard(self, shard: _Shard) -> None:
        if shard.descriptor >= 0:
            os.close(shard.descriptor)
            shard.descriptor = -1
        if shard.is_ours and shard.path is not None:
            with suppress(OSError, TargetError), TargetRoot.open(shard.path.parent) as folder:
                folder.unlink(shard.path.name)

    def check_unchanged(self) -> None:
        """Do nothing: the revision is a commit, which cannot change."""

    def interrupt(self) -> None:
        """See :class:`nvfp4_prep.checkpoint.source.Source`."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Stop downloads and close descriptors. Shards that are still needed stay, for the next run to go on with;
        when all were released, the work directory goes too.
        """
        self.interrupt()
        until = time.monotonic() + _GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._changed:
            for shard in self._shards.values():
                if shard.descriptor >= 0:
                    os.close(shard.descriptor)
                    shard.descriptor = -1
            self._shards.clear()
            self._order.clear()
        if self.work_dir is not None:
            with suppress(OSError):
                self.work_dir.rmdir()
