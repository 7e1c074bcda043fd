"""A checkpoint on the Hub, read by range requests: planning, inspecting and comparing without a download."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from nvfp4_prep._util.system import start_thread
from nvfp4_prep.checkpoint.filenames import SAFETENSORS
from nvfp4_prep.checkpoint.local_files import read_exactly
from nvfp4_prep.checkpoint.safetensors_header import header_nbytes, parse_header
from nvfp4_prep.checkpoint.source import SourceFile
from nvfp4_prep.checkpoint.tensors import ShardHeader
from nvfp4_prep.errors import SourceError
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.hub.download import Downloader
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.listing import RemoteFile, read_snapshot

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["RangeSource", "is_small"]

_HEAD_NBYTES = 1 << 20
"""First request of a shard: a header of Kimi-K2.5 (about 330 kB) and the scalars behind it fit."""
_SMALL_NBYTES = 64 << 20
_SMALL_KEPT = 4
_HEADER_THREADS = 8


class RangeSource:
    """A repository at one commit; a :class:`~nvfp4_prep.checkpoint.source.Source` that needs no disk.

    Files of weights are read by range requests, or in the user's cache where they are there. Such bytes are not
    compared with a hash, because no file is ever whole: use it only where wrong bytes cannot pass unnoticed. Small
    files are read whole and checked.

    Peak memory: 1 MiB for each file of weights, what is being read, and 256 MiB of small files at the very most.
    """

    sequential = True

    def __init__(self, address: HubAddress, *, patience: Patience | None = None, api: HfApi | None = None) -> None:
        """Resolve the revision and list the files.

        Args:
            address: what to read.
            patience: how long network failures are endured.
            api: the official client; by default with the user's endpoint and token.

        Raises:
            HubError: if the repository or the revision is missing or closed, or the Hub cannot be reached.
        """
        from huggingface_hub import HfApi

        patience = patience or Patience()
        api = api or HfApi()
        self.snapshot = read_snapshot(api, address.repo_id, address.revision, patience.at_first_contact())
        self.label = address.repo_id
        self.revision: str | None = self.snapshot.commit
        self.downloader = Downloader(api, self.snapshot, patience, threading.Event())
        self._lock = threading.Lock()
        self._small: OrderedDict[str, bytes] = OrderedDict()
        self._heads: dict[str, Future[bytes]] = {}
        self._seen: dict[str, dict[tuple[int, int], bytes]] = {}

    @property
    def received_nbytes(self) -> int:
        """Bytes that came over the network so far (plain transfers only; Xet does not tell)."""
        return self.downloader.received_nbytes

    def where(self, file: str = "") -> str:
        """See :class:`nvfp4_prep.checkpoint.source.Source`."""
        return f"{self.label}/{file}" if file else self.label

    def files(self) -> tuple[SourceFile, ...]:
        """Return all files, sorted by name; hidden ones left out."""
        return tuple(
            SourceFile(file.name, file.nbytes, file.identity) for _, file in sorted(self.snapshot.visible.items())
        )

    def header(self, file: str) -> ShardHeader:
        """See :class:`nvfp4_prep.checkpoint.source.Source`. The first call asks for the heads of all shards at once."""
        remote = self._remote(file)
        prefix = self.peek(file, 0, min(8, remote.nbytes))
        where = f"{self.label}/{file}"
        length = header_nbytes(where, prefix, remote.nbytes)
        return parse_header(file, self.peek(file, 0, 8 + length), remote.nbytes, where=where)

    def peek(self, file: str, offset_bytes: int, nbytes: int) -> bytes:
        """See :class:`nvfp4_prep.checkpoint.source.Source`. What it gave is noted, for
        sources that see the whole file later."""
        remote = self._remote(file)
        if is_small(remote):
            return self._whole(remote)[offset_bytes : offset_bytes + nbytes]
        head = self._head(remote)
        if offset_bytes + nbytes <= len(head):
            data = head[offset_bytes : offset_bytes + nbytes]
        else:
            data = self._read_remote(remote, offset_bytes, nbytes)
        self._seen.setdefault(file, {})[(offset_bytes, nbytes)] = hashlib.sha256(data).digest()
        return data

    def _read_remote(self, remote: RemoteFile, offset_bytes: int, nbytes: int) -> bytes:
        local = self.downloader.cached(remote)
        if local is None:
            return self.downloader.read_range(remote, offset_bytes, nbytes)
        with local.open("rb") as stream:
            buffer = bytearray(nbytes)
            read_exactly(stream.fileno(), remote.name, offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def _head(self, remote: RemoteFile) -> bytes:
        with self._lock:
            if remote.name not in self._heads:
                shards = [file for name, file in self.snapshot.files.items() if name.endswith(SAFETENSORS)]
                first = [file for file in shards if "/" not in file.name and not self._heads]
                self._fetch_heads({remote, *first})
            head = self._heads[remote.name]
        return head.result()

    def _fetch_heads(self, files: set[RemoteFile]) -> None:
        """Fetch several at a time, in threads that an interrupted program need not wait for (unlike a pool's)."""
        waiting = sorted(files, key=lambda file: file.name)
        self._heads.update({file.name: Future() for file in waiting})
        heads = [(file, self._heads[file.name]) for file in waiting]

        def work() -> None:
            while heads:
                try:
                    file, head = heads.pop(0)
                except IndexError:
                    return  # another thread took the last one
                try:
                    head.set_result(self._read_remote(file, 0, min(_HEAD_NBYTES, file.nbytes)))
                except BaseException as error:
                    head.set_exception(error)

        for _ in range(min(_HEADER_THREADS, len(heads))):
            start_thread(threading.Thread(target=work, name="fetch headers", daemon=True))

    def _whole(self, remote: RemoteFile) -> bytes:
        with self._lock:
            if remote.name not in self._small:
                self._small[remote.name] = self.downloader.read_whole(remote)
                while len(self._small) > _SMALL_KEPT:
                    self._small.popitem(last=False)
            return self._small[remote.name]

    def _remote(self, file: str) -> RemoteFile:
        try:
            return self.snapshot.files[file]
        except KeyError:
            raise SourceError("no such file at this commit", where=f"{self.label}/{file}") from None

    def schedule(self, shards: Sequence[str], at_once_nbytes: int = 0) -> None:
        """Do nothing: no file is fetched ahead."""

    def room_nbytes(self, shards: Sequence[str], at_once_nbytes: int) -> int:
        """Return 0: no file is stored."""
        return 0

    def read_into(self, file: str, offset_bytes: int, buffer: memoryview) -> None:
        """See :class:`nvfp4_prep.checkpoint.source.Source`."""
        remote = self._remote(file)
        if is_small(remote) or offset_bytes + len(buffer) <= _HEAD_NBYTES:
            buffer[:] = self.peek(file, offset_bytes, len(buffer))
        else:
            buffer[:] = self._read_remote(remote, offset_bytes, len(buffer))

    def will_read(self, file: str, offset_bytes: int, nbytes: int) -> None:
        """Do nothing: no file is fetched ahead."""

    def release(self, shard: str) -> None:
        """Do nothing: no file is held."""

    def check_unchanged(self) -> None:
        """Do nothing: the revision is a commit, which cannot change."""

    def interrupt(self) -> None:
        """See :class:`nvfp4_prep.checkpoint.source.Source`."""
        self.downloader.stop.set()

    def close(self) -> None:
        """End all waiting."""
        self.interrupt()


def is_small(file: RemoteFile) -> bool:
    """Return whether a file is read whole, into memory."""
    return file.nbytes <= _SMALL_NBYTES and not file.name.endswith(SAFETENSORS)
