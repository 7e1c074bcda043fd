"""What the Hub says about a repository's files: sizes and hashes, at one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_prep.errors import SourceError
from nvfp4_prep.hub.client import Patience, hub_errors, persist
from nvfp4_prep.paths import is_safe_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = ["LocalFile", "RemoteFile", "Snapshot", "git_blob_sha1", "hash_matches", "read_snapshot"]

_CHUNK_NBYTES = 8 << 20


@dataclass(frozen=True)
class RemoteFile:
    """One file at one commit.

    Attributes:
        name: path in the repository.
        nbytes: size.
        sha256: of the content, for files that the Hub keeps outside git (all weights).
        git_sha1: git's blob id: of the content where ``sha256`` is None, else of the pointer.
        in_xet: whether the client could fetch it through Xet.
    """

    name: str
    nbytes: int
    sha256: str | None
    git_sha1: str
    in_xet: bool = False

    @property
    def identity(self) -> str:
        """Changes when the content does."""
        return f"sha256={self.sha256}" if self.sha256 else f"git-sha1={self.git_sha1}"


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        repo_id: ``ORG/NAME``.
        commit: full hash; everything is read at it, whatever happens to the branch meanwhile.
        files: name to file.
    """

    repo_id: str
    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class LocalFile:
    """A file to publish, as its manifest describes it."""

    path: Path
    nbytes: int
    sha256: str

    def difference(self, remote: RemoteFile | None) -> str | None:
        """What keeps a published file from being this one; None if nothing does.

        Files that the Hub keeps in git (small ones) have only git's hash there, so they are read here.
        """
        if remote is None:
            return "is missing"
        if remote.nbytes != self.nbytes:
            return f"has {remote.nbytes} bytes instead of {self.nbytes}"
        if remote.sha256 is not None:
            return None if remote.sha256 == self.sha256 else f"has sha256 {remote.sha256} instead of {self.sha256}"
        content = self.path.read_bytes() if self.path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            return f"cannot be compared: {self.path} is not what the manifest says"
        return None if git_blob_sha1(content) == remote.git_sha1 else "has another content"


def read_snapshot(api: HfApi, repo_id: str, revision: str | None, patience: Patience) -> Snapshot:
    """Resolves a revision to a commit and lists its files.

    Raises:
        HubError: if the repository, the revision or the access is missing, or the Hub cannot be reached.
        SourceError: if a file's name would leave a directory.
    """
    from huggingface_hub.hf_api import RepoFile

    def ask() -> Snapshot:
        commit = api.model_info(repo_id, revision=revision).sha
        if commit is None:
            raise SourceError("the Hub named no commit", where=repo_id, next_step="Try again later.")
        entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        found = [_remote_file(entry) for entry in entries if isinstance(entry, RepoFile)]
        return Snapshot(repo_id, commit, {file.name: file for file in found})

    with hub_errors(repo_id + (f"@{revision}" if revision else "")):
        snapshot = persist(ask, what=f"listing {repo_id}", patience=patience)
    for name in snapshot.files:
        if not is_safe_name(name):
            raise SourceError("unsafe file name on the Hub", where=repo_id, actual=repr(name)[:200])
    return snapshot


def _remote_file(entry: RepoFile) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs else None
    return RemoteFile(entry.path, entry.size, sha256, entry.blob_id, in_xet=bool(entry.xet_hash))


def git_blob_sha1(content: bytes) -> str:
    """The id that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def hash_matches(file: RemoteFile, path: Path) -> bool:
    """Whether a local file has exactly the bytes that the Hub lists. Reads it once, 8 MiB at a time."""
    if path.stat().st_size != file.nbytes:
        return False
    if file.sha256 is None:
        digest = hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_NBYTES)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest() == (file.sha256 or file.git_sha1)
