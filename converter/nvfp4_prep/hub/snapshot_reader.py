"""Reading files of a snapshot into memory, and the requests that downloads share with it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvfp4_prep._util.printable import mask_passwords
from nvfp4_prep.errors import HubError, SourceError
from nvfp4_prep.hub.errors import Patience, hub_errors, persist, well_formed
from nvfp4_prep.hub.listing import RemoteFile, Snapshot, git_blob_sha1, hash_matches

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["CORRUPT_ATTEMPTS", "DAMAGED", "SnapshotReader"]

_T = TypeVar("_T")
CORRUPT_ATTEMPTS = 3
"""Downloads of one file with another hash than the Hub lists before that is an error."""
DAMAGED = "The Hub's storage or a proxy on the way damages it: try another network, or run the same command later."


class SnapshotReader:
    """Reader of one snapshot's files, whole or by ranges, which writes nothing. Safe to use from several threads.

    Memory: what a call returns.
    """

    def __init__(self, api: HfApi, snapshot: Snapshot, patience: Patience, stop: threading.Event) -> None:
        """Read nothing yet; ``stop`` ends all waiting."""
        self.api = api
        self.snapshot = snapshot
        self.patience = patience
        self.stop = stop
        self.received_nbytes = 0
        self.bar = _silent_bar(self.count)

    def count(self, nbytes: int) -> None:
        """Count bytes that arrived; the client calls it for every piece, so that a transfer can be stopped here only.

        Raises:
            HubError: if the download was stopped.
        """
        self.received_nbytes += nbytes
        if self.stop.is_set():
            raise HubError("download was stopped", next_step="Run the same command again: it continues.")

    def cached(self, file: RemoteFile) -> Path | None:
        """Return the file in the user's cache, where its size is right; its hash is not checked here."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.snapshot.repo_id, file.name, revision=self.snapshot.commit)
        path = Path(found) if isinstance(found, str) else None
        return path if path is not None and path.is_file() and path.stat().st_size == file.nbytes else None

    def read_whole(self, file: RemoteFile) -> bytes:
        """Return a small file's checked bytes, from the user's cache or the Hub; nothing is written."""
        local = self.cached(file)
        if local is not None and hash_matches(file, local):
            return local.read_bytes()
        with hub_errors(f"{self.snapshot.repo_id}/{file.name}"):
            for _ in range(CORRUPT_ATTEMPTS):
                content = self.persist(file, lambda: self._get(file, None)) if file.nbytes else b""
                if _content_matches(file, content):
                    return content
        raise HubError(
            f"downloaded {CORRUPT_ATTEMPTS} times, and never with the listed hash",
            where=f"{self.snapshot.repo_id}/{file.name}",
            expected=f"{file.nbytes} bytes, {file.identity}",
            actual=f"{len(content)} bytes",
            next_step=DAMAGED,
        )

    def read_range(self, file: RemoteFile, offset_bytes: int, nbytes: int) -> bytes:
        """Return a range of a file, by one request; the caller must check it against the whole file later.

        Raises:
            HubError: if access is refused, the network stays away, or ranges are not served.
            SourceError: if the range leaves the file.
        """
        if offset_bytes + nbytes > file.nbytes:
            raise SourceError(
                "read past the end",
                where=file.name,
                expected=f"at most {file.nbytes} bytes",
                actual=offset_bytes + nbytes,
            )
        if nbytes == 0:
            return b""
        with hub_errors(f"{self.snapshot.repo_id}/{file.name}"):
            return self.persist(file, lambda: self._get(file, (offset_bytes, nbytes)))

    def _get(self, file: RemoteFile, part: tuple[int, int] | None) -> bytes:
        from huggingface_hub import constants, get_session, hf_raise_for_status

        headers = self.headers()
        if part is not None:
            headers["Range"] = f"bytes={part[0]}-{part[0] + part[1] - 1}"
        wanted = file.nbytes if part is None else part[1]
        content = bytearray()
        with get_session().stream(
            "GET", self.url(file), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            hf_raise_for_status(response)
            if part is not None and response.status_code != 206:
                raise HubError(
                    "does not answer range requests",
                    where=mask_passwords(self.api.endpoint),
                    expected="status 206",
                    actual=response.status_code,
                    next_step="Use the Hub itself or a mirror that serves ranges (HF_ENDPOINT).",
                )
            for piece in response.iter_bytes():
                content += piece
                self.count(len(piece))
                if len(content) > wanted:
                    break  # a wrong answer; how long it would become is not our memory's business
        if len(content) != wanted:
            raise ConnectionError(f"{file.name}: {len(content)} bytes instead of {wanted}")
        return bytes(content)

    def persist(self, file: RemoteFile, action: Callable[[], _T], progress: Callable[[], int] | None = None) -> _T:
        """Return what an action gives, tried again while the network fails and patience lasts."""

        def well() -> _T:
            with well_formed(f"{self.snapshot.repo_id}/{file.name}"):
                return action()

        return persist(
            well,
            what=f"downloading {file.name}",
            patience=self.patience,
            progress=progress or (lambda: 0),
            stop=self.stop,
        )

    def url(self, file: RemoteFile) -> str:
        """Return a file's address at the snapshot's commit."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.snapshot.repo_id, file.name, revision=self.snapshot.commit, endpoint=self.api.endpoint)

    def headers(self) -> dict[str, str]:
        """Return the headers of a request in the user's name."""
        from huggingface_hub.utils import build_hf_headers

        return dict(build_hf_headers(token=self.api.token))


def _content_matches(file: RemoteFile, content: bytes) -> bool:
    if file.sha256 is not None:
        return hashlib.sha256(content).hexdigest() == file.sha256
    return git_blob_sha1(content) == file.git_sha1


def _silent_bar(count: Callable[[int], None]) -> type[Any]:
    """Return a bar for the client that counts bytes and draws nothing: several at once garble the terminal."""
    from tqdm import tqdm

    class SilentBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

    return SilentBar
