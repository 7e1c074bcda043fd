"""Bringing one file of a snapshot to the disk: resumed, retried, and checked before anyone sees it."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvfp4_prep._util.printable import mask_passwords
from nvfp4_prep.errors import HubError, SourceError
from nvfp4_prep.hub.errors import Patience, hub_errors, malformed, persist, well_formed
from nvfp4_prep.hub.listing import RemoteFile, Snapshot, git_blob_sha1, hash_matches
from nvfp4_prep.hub.work_files import partial_path, refuse_link
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.target_root import TargetRoot

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Downloader"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_CORRUPT_ATTEMPTS = 3
_XET = ".xet"
_FILE_NAME = re.compile(r"(?!\.)[A-Za-z0-9._=+-]{1,200}")
_DAMAGED = "The Hub's storage or a proxy on the way damages it: try another network, or run the same command later."


class Downloader:
    """Fetches files of one snapshot. Safe to use from several threads, one file each.

    Plain HTTP goes through the client's ``http_get`` into a partial file that survives failures and restarts, so that
    a transfer always goes on at the byte where it stopped. Where the client would use Xet (``hf_xet`` is installed and
    the file is stored there), its ``hf_hub_download`` is tried first, because Xet transfers in parallel; should that
    fail, plain HTTP takes over. Either way the file's size and hash are checked before it gets its name.

    Memory: one 10 MB piece a file being fetched, and 8 MiB while its hash is computed.
    """

    def __init__(self, api: HfApi, snapshot: Snapshot, patience: Patience, stop: threading.Event) -> None:
        """Read nothing yet; ``stop`` ends all waiting."""
        self.api = api
        self.snapshot = snapshot
        self.patience = patience
        self.stop = stop
        self.received_nbytes = 0
        self._xet_failed = False
        self._bar = _silent_bar(self._count)

    def _count(self, nbytes: int) -> None:
        """Called by the client for every piece that arrives; the one place where a transfer can be stopped."""
        self.received_nbytes += nbytes
        if self.stop.is_set():
            raise HubError("download was stopped", next_step="Run the same command again: it continues.")

    def cached(self, file: RemoteFile) -> Path | None:
        """Return the file in the user's cache, where its size is right; its hash is not checked here."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.snapshot.repo_id, file.name, revision=self.snapshot.commit)
        path = Path(found) if isinstance(found, str) else None
        return path if path is not None and path.is_file() and path.stat().st_size == file.nbytes else None

    def fetch(self, file: RemoteFile, target: Path) -> None:
        """Bring ``file`` to ``target``, going on with ``target``'s partial file where there is one.

        Raises:
            HubError: if access is refused, the network stays away, or the bytes are wrong again and again.
            NoSpaceError: if the disk is full.
        """
        for path in (target.parent, target, target.with_suffix(_XET)):
            refuse_link(path)
        partial = partial_path(target).name
        # All of it in one held directory: what takes its name meanwhile, a link to elsewhere too, gets nothing.
        with hub_errors(f"{self.snapshot.repo_id}/{file.name}"), _open_folder(target.parent) as folder:
            for _ in range(_CORRUPT_ATTEMPTS):
                if not (self._xet_wanted(file) and self._fetch_by_xet(file, folder, partial)):
                    self._fetch_by_http(file, folder, partial)
                if hash_matches(file, folder.held_path / partial):
                    folder.move(partial, target.name, replace=True)
                    return
                _log.warning("%s: bytes do not have the hash that the Hub lists; fetching it again", file.name)
                folder.unlink(partial)
        raise HubError(
            f"downloaded {_CORRUPT_ATTEMPTS} times, and never with the listed hash",
            where=f"{self.snapshot.repo_id}/{file.name}",
            expected=file.identity,
            next_step=_DAMAGED,
        )

    def fetch_to_cache(self, file: RemoteFile) -> Path:
        """Bring ``file`` to the user's cache by the client's own means and return its path there.

        Raises:
            HubError: as :meth:`fetch`.
        """
        from huggingface_hub import hf_hub_download

        def get(force: bool) -> Path:
            self._check_etag(file)
            return Path(
                hf_hub_download(
                    self.snapshot.repo_id,
                    file.name,
                    revision=self.snapshot.commit,
                    endpoint=self.api.endpoint,
                    token=self.api.token,
                    force_download=force,
                    tqdm_class=self._bar,
                )
            )

        with hub_errors(f"{self.snapshot.repo_id}/{file.name}"):
            for attempt in range(_CORRUPT_ATTEMPTS):
                path = self._persist(file, functools.partial(get, attempt > 0))
                if hash_matches(file, path):
                    return path
        raise HubError(
            "the cache holds it with another hash than the Hub lists, even after downloading it again",
            where=f"{self.snapshot.repo_id}/{file.name}",
            expected=file.identity,
            next_step=_DAMAGED,
        )

    def _check_etag(self, file: RemoteFile) -> None:
        """Refuse an ETag that the client would take for the name of a file in the cache and that is none."""
        from huggingface_hub import get_hf_file_metadata

        etag = get_hf_file_metadata(self._url(file), token=self.api.token).etag
        if etag is not None and _FILE_NAME.fullmatch(etag) is None:
            raise malformed(f"{self.snapshot.repo_id}/{file.name}", "the ETag", etag)

    def read_whole(self, file: RemoteFile) -> bytes:
        """Return a small file's checked bytes, from the user's cache or the Hub; nothing is written."""
        local = self.cached(file)
        if local is not None and hash_matches(file, local):
            return local.read_bytes()
        with hub_errors(f"{self.snapshot.repo_id}/{file.name}"):
            for _ in range(_CORRUPT_ATTEMPTS):
                content = self._persist(file, lambda: self._get(file, None)) if file.nbytes else b""
                if _content_matches(file, content):
                    return content
        raise HubError(
            f"downloaded {_CORRUPT_ATTEMPTS} times, and never with the listed hash",
            where=f"{self.snapshot.repo_id}/{file.name}",
            expected=f"{file.nbytes} bytes, {file.identity}",
            actual=f"{len(content)} bytes",
            next_step=_DAMAGED,
        )

    def read_range(self, file: RemoteFile, offset_bytes: int, nbytes: int) -> bytes:
        """Return a range of a file, by one request; the caller must check it against the whole file later.

        Raises:
            HubError: as :meth:`fetch`.
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
            return self._persist(file, lambda: self._get(file, (offset_bytes, nbytes)))

    def _get(self, file: RemoteFile, part: tuple[int, int] | None) -> bytes:
        from huggingface_hub import constants, get_session, hf_raise_for_status

        headers = self._headers()
        if part is not None:
            headers["Range"] = f"bytes={part[0]}-{part[0] + part[1] - 1}"
        wanted = file.nbytes if part is None else part[1]
        content = bytearray()
        with get_session().stream(
            "GET", self._url(file), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
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
                self._count(len(piece))
                if len(content) > wanted:
                    break  # a wrong answer; how long it would become is not our memory's business
        if len(content) != wanted:
            raise ConnectionError(f"{file.name}: {len(content)} bytes instead of {wanted}")
        return bytes(content)

    def _fetch_by_http(self, file: RemoteFile, folder: TargetRoot, partial: str) -> None:
        from huggingface_hub.file_download import http_get

        def transfer() -> None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            with os.fdopen(folder.open_file(partial, flags), "ab+") as stream:
                if stream.seek(0, 2) > file.nbytes:
                    stream.truncate(0)
                http_get(
                    self._url(file),
                    stream,
                    resume_size=stream.seek(0, 2),
                    headers=self._headers(),
                    expected_size=file.nbytes,
                    displayed_filename=file.name,
                    tqdm_class=self._bar,
                )

        self._persist(file, transfer, lambda: _nbytes(folder, partial))

    def _xet_wanted(self, file: RemoteFile) -> bool:
        from huggingface_hub import constants

        usable = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
        return file.in_xet and usable and not self._xet_failed

    def _fetch_by_xet(self, file: RemoteFile, folder: TargetRoot, partial: str) -> bool:
        """Try the client's Xet transfer; False where plain HTTP should do it."""
        from huggingface_hub import hf_hub_download

        if _nbytes(folder, partial) > 0:
            return False  # a plain transfer stopped here: going on is cheaper than starting over
        place = Path(partial).with_suffix(_XET).name
        try:
            self._check_etag(file)
            found = hf_hub_download(
                self.snapshot.repo_id,
                file.name,
                revision=self.snapshot.commit,
                local_dir=folder.held_path / place,
                endpoint=self.api.endpoint,
                token=self.api.token,
                tqdm_class=self._bar,
            )
            Path(found).replace(folder.held_path / partial)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            # hf_xet raises whatever its native code reports: there is nothing to tell apart, and HTTP will tell.
            _log.warning(
                "%s: Xet transfer failed (%s); using plain HTTP from here on", file.name, mask_passwords(str(error))
            )
            self._xet_failed = True
            return False
        finally:
            with contextlib.suppress(OSError):
                folder.remove_tree(place)
        return True

    def _persist(self, file: RemoteFile, action: Callable[[], _T], progress: Callable[[], int] | None = None) -> _T:
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

    def _url(self, file: RemoteFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.snapshot.repo_id, file.name, revision=self.snapshot.commit, endpoint=self.api.endpoint)

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return dict(build_hf_headers(token=self.api.token))


def _open_folder(path: Path) -> TargetRoot:
    """Open the folder of downloads; it goes away when the run that it belongs to has failed."""
    try:
        return TargetRoot(path, make=True)
    except OSError as error:
        raise translate_os_error(error, path) from error


def _nbytes(folder: TargetRoot, name: str) -> int:
    status = folder.status(name)
    return 0 if status is None else status.st_size


def _content_matches(file: RemoteFile, content: bytes) -> bool:
    if file.sha256 is not None:
        return hashlib.sha256(content).hexdigest() == file.sha256
    return git_blob_sha1(content) == file.git_sha1


def _silent_bar(count: Callable[[int], None]) -> type[Any]:
    """A progress bar for the client that draws nothing (several at once garble the terminal) and reports bytes."""
    from tqdm import tqdm

    class SilentBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

    return SilentBar
