"""The Hub's listing of a repository's files: sizes and hashes, at one commit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_prep._util.digests import is_sha256
from nvfp4_prep.checkpoint.filenames import is_safe_name
from nvfp4_prep.errors import SourceError
from nvfp4_prep.hub.errors import Patience, hub_errors, malformed, persist, well_formed

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = [
    "LocalFile",
    "RemoteFile",
    "Snapshot",
    "git_blob_sha1",
    "hash_matches",
    "is_git_id",
    "read_snapshot",
]

_CHUNK_NBYTES = 8 << 20
_MAX_FILES = 100_000
"""Most files of one listing, which a server could make endless."""
_MAX_NBYTES = 1 << 60
_GIT_ID = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


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

    @property
    def visible(self) -> Mapping[str, RemoteFile]:
        """The files without hidden ones: .gitattributes is the repository's, no part of a checkpoint."""
        return {
            name: file for name, file in self.files.items() if not any(part.startswith(".") for part in name.split("/"))
        }


@dataclass(frozen=True)
class LocalFile:
    """A file to publish, as its manifest describes it."""

    path: Path
    nbytes: int
    sha256: str

    def difference(self, remote: RemoteFile | None) -> str | None:
        """Return the difference of a published file from this one; ``None`` if there is none.

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


def is_git_id(value: object) -> bool:
    """Return whether this is the id of a git object: it becomes the name of a file, and part of addresses."""
    return isinstance(value, str) and _GIT_ID.fullmatch(value) is not None


def read_snapshot(api: HfApi, repo_id: str, revision: str | None, patience: Patience) -> Snapshot:
    """Resolve a revision to a commit and list its files.

    Raises:
        HubError: if the repository, the revision or the access is missing, the Hub cannot be reached, or its answer is
            not what a Hub answers.
        SourceError: if a file's name would leave a directory.
    """

    def ask() -> Snapshot:
        from huggingface_hub.hf_api import RepoFile

        with well_formed(repo_id):
            commit = api.model_info(repo_id, revision=revision).sha
        if not is_git_id(commit) or commit is None:
            raise malformed(repo_id, "the commit", commit)
        with well_formed(repo_id):
            entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
            listed = list(islice(entries, _MAX_FILES + 1))
        if len(listed) > _MAX_FILES:
            raise malformed(repo_id, "the number of files", f"more than {_MAX_FILES}")
        found = [_remote_file(repo_id, entry) for entry in listed if isinstance(entry, RepoFile)]
        return Snapshot(repo_id, commit, {file.name: file for file in found})

    where = repo_id + (f"@{revision}" if revision else "")
    with hub_errors(where, begun=not patience.is_first_contact):
        return persist(ask, what=f"listing {repo_id}", patience=patience)


def _remote_file(repo_id: str, entry: RepoFile) -> RemoteFile:
    """Return a listing's entry, every value checked: names and hashes become paths, sizes become room and memory."""
    name, where = entry.path, f"{repo_id}/{str(entry.path)[:200]}"
    if not isinstance(name, str) or not is_safe_name(name):
        raise SourceError("unsafe file name on the Hub", where=repo_id, actual=repr(name)[:200])
    sha256 = entry.lfs.sha256 if entry.lfs else None
    if entry.lfs and not is_sha256(sha256):  # it becomes the name of a file
        raise malformed(where, "the LFS sha256", sha256)
    if not is_git_id(entry.blob_id):
        raise malformed(where, "the git id", entry.blob_id)
    for size in (entry.size, entry.lfs.size if entry.lfs else entry.size):
        if type(size) is not int or not 0 <= size <= _MAX_NBYTES:
            raise malformed(where, "the size", size)
    return RemoteFile(name, entry.size, sha256, entry.blob_id, in_xet=bool(entry.xet_hash))


def git_blob_sha1(content: bytes) -> str:
    """Return the id that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def hash_matches(file: RemoteFile, path: Path) -> bool:
    """Return whether a local file has exactly the bytes that the Hub lists. Reads it once, 8 MiB at a time."""
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
