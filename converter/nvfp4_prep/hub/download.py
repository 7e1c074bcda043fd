"""Bringing one file of a snapshot to the disk: resumed, retried, and checked before anyone sees it."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_prep._util.printable import mask_passwords
from nvfp4_prep.errors import HubError
from nvfp4_prep.hub.errors import Patience, hub_errors, malformed
from nvfp4_prep.hub.listing import RemoteFile, Snapshot, hash_matches
from nvfp4_prep.hub.snapshot_reader import CORRUPT_ATTEMPTS, DAMAGED, SnapshotReader
from nvfp4_prep.hub.work_files import partial_path, refuse_link
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.target_root import TargetRoot

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Downloader"]

_log = logging.getLogger(__name__)
_XET = ".xet"
_FILE_NAME = re.compile(r"(?!\.)[A-Za-z0-9._=+-]{1,200}")


class Downloader(SnapshotReader):
    """Downloader of one snapshot's files to the disk. Safe to use from several threads, one file each.

    Plain HTTP goes through the client's ``http_get`` into a partial file that survives failures and restarts, so that
    a transfer always goes on at the byte where it stopped. Where the client would use Xet (``hf_xet`` is installed and
    the file is stored there), its ``hf_hub_download`` is tried first, because Xet transfers in parallel; should that
    fail, plain HTTP takes over. Either way the file's size and hash are checked before it gets its name.

    Memory: one 10 MB piece a file being fetched, and 8 MiB while its hash is computed.
    """

    def __init__(self, api: HfApi, snapshot: Snapshot, patience: Patience, stop: threading.Event) -> None:
        """Read nothing yet; ``stop`` ends all waiting."""
        super().__init__(api, snapshot, patience, stop)
        self._xet_failed = False

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
            for _ in range(CORRUPT_ATTEMPTS):
                if not (self._xet_wanted(file) and self._fetch_by_xet(file, folder, partial)):
                    self._fetch_by_http(file, folder, partial)
                if hash_matches(file, folder.held_path / partial):
                    folder.move(partial, target.name, replace=True)
                    return
                _log.warning("%s: bytes do not have the hash that the Hub lists; fetching it again", file.name)
                folder.unlink(partial)
        raise HubError(
            f"downloaded {CORRUPT_ATTEMPTS} times, and never with the listed hash",
            where=f"{self.snapshot.repo_id}/{file.name}",
            expected=file.identity,
            next_step=DAMAGED,
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
                    tqdm_class=self.bar,
                )
            )

        with hub_errors(f"{self.snapshot.repo_id}/{file.name}"):
            for attempt in range(CORRUPT_ATTEMPTS):
                path = self.persist(file, functools.partial(get, attempt > 0))
                if hash_matches(file, path):
                    return path
        raise HubError(
            "the cache holds it with another hash than the Hub lists, even after downloading it again",
            where=f"{self.snapshot.repo_id}/{file.name}",
            expected=file.identity,
            next_step=DAMAGED,
        )

    def _check_etag(self, file: RemoteFile) -> None:
        """Refuse an ETag that the client would take for the name of a file in the cache and that cannot be one."""
        from huggingface_hub import get_hf_file_metadata

        etag = get_hf_file_metadata(self.url(file), token=self.api.token).etag
        if etag is not None and _FILE_NAME.fullmatch(etag) is None:
            raise malformed(f"{self.snapshot.repo_id}/{file.name}", "the ETag", etag)

    def _fetch_by_http(self, file: RemoteFile, folder: TargetRoot, partial: str) -> None:
        from huggingface_hub.file_download import http_get

        def transfer() -> None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            with os.fdopen(folder.open_file(partial, flags), "ab+") as stream:
                if stream.seek(0, 2) > file.nbytes:
                    stream.truncate(0)
                http_get(
                    self.url(file),
                    stream,
                    resume_size=stream.seek(0, 2),
                    headers=self.headers(),
                    expected_size=file.nbytes,
                    displayed_filename=file.name,
                    tqdm_class=self.bar,
                )

        self.persist(file, transfer, lambda: _nbytes(folder, partial))

    def _xet_wanted(self, file: RemoteFile) -> bool:
        from huggingface_hub import constants

        usable = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
        return file.in_xet and usable and not self._xet_failed

    def _fetch_by_xet(self, file: RemoteFile, folder: TargetRoot, partial: str) -> bool:
        """Try the client's Xet transfer; False where plain HTTP should do it."""
        from huggingface_hub import hf_hub_download

        if _nbytes(folder, partial) > 0:
            return False  # a plain transfer stopped here: going on is cheaper than starting over
        xet_folder = Path(partial).with_suffix(_XET).name
        try:
            self._check_etag(file)
            found = hf_hub_download(
                self.snapshot.repo_id,
                file.name,
                revision=self.snapshot.commit,
                local_dir=folder.held_path / xet_folder,
                endpoint=self.api.endpoint,
                token=self.api.token,
                tqdm_class=self.bar,
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
                folder.remove_tree(xet_folder)
        return True


def _open_folder(path: Path) -> TargetRoot:
    """Open the folder of downloads; it goes away when the run that it belongs to has failed."""
    try:
        return TargetRoot.open(path, make=True)
    except OSError as error:
        raise translate_os_error(error, path) from error


def _nbytes(folder: TargetRoot, name: str) -> int:
    status = folder.status(name)
    return 0 if status is None else status.st_size
