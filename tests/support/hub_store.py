"""What the loopback Hub keeps: repositories, commits, large objects. No HTTP here (see hub_server)."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
REGULAR_LIMIT_NBYTES = 10_000_000


class HubRefusalError(Exception):
    """A request that the Hub answers with an error status."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Blob:
    """A file's content; ``lfs`` says whether git holds it or only a pointer."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        content = self.data
        if self.lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str | None
    title: str
    tree: Mapping[str, Blob]


@dataclass
class Pull:
    """A pull request."""

    num: int
    title: str
    status: str = "draft"


@dataclass
class Repository:
    """A model repository: branches and ``refs/pr/N`` point to commits."""

    repo_id: str
    private: bool = False
    gated: bool = False
    heads: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    def add_commit(self, branch: str, title: str, tree: Mapping[str, Blob]) -> Commit:
        parent = self.heads.get(branch)
        digest = json.dumps([self.repo_id, branch, parent, title, len(self.commits), sorted(tree)])
        commit = Commit(hashlib.sha1(digest.encode()).hexdigest(), parent, title, dict(tree))
        self.commits[commit.oid] = commit
        self.heads[branch] = commit.oid
        return commit

    def resolve(self, revision: str) -> Commit:
        oid = self.heads.get(revision, revision)
        if oid not in self.commits:
            raise HubRefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, branch: str = "main") -> Iterator[Commit]:
        """The branch's commits, oldest first."""
        chain = []
        oid: str | None = self.heads[branch]
        while oid is not None:
            chain.append(self.commits[oid])
            oid = self.commits[oid].parent
        return reversed(chain)


class Store:
    """All repositories and the large objects that were uploaded, whether committed or not."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise HubRefusalError(404, "RepoNotFound", "Repository not found")
        return self.repositories[repo_id]

    def create(self, repo_id: str, private: bool = False) -> Repository:
        if repo_id in self.repositories:
            raise HubRefusalError(409, None, "You already created this model repo")
        repository = self.repositories[repo_id] = Repository(repo_id, private)
        repository.add_commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return repository

    def publish(self, repo_id: str, files: Mapping[str, bytes], branch: str = "main") -> Commit:
        """Puts files into a repository in one commit, as a test's starting point."""
        repository = self.repositories.get(repo_id) or self.create(repo_id)
        tree = {name: Blob(data, self.is_large(name, len(data))) for name, data in files.items()}
        self.objects.update({blob.sha256: blob.data for blob in tree.values() if blob.lfs})
        return repository.add_commit(branch, "upload", tree)

    @staticmethod
    def is_large(path: str, nbytes: int) -> bool:
        return path.endswith(LFS_SUFFIXES) or nbytes > REGULAR_LIMIT_NBYTES

    def put_object(self, oid: str, data: bytes) -> None:
        """Takes an upload; like the real storage, only if the bytes are what the name says."""
        actual = hashlib.sha256(data).hexdigest()
        if actual != oid:
            raise HubRefusalError(400, None, f"XAmzContentChecksumMismatch: expected {oid}, got {actual}")
        self.objects[oid] = data

    def commit(self, repo_id: str, branch: str, body: bytes) -> Commit:
        """Applies a commit request (newline-delimited JSON)."""
        repository = self.repository(repo_id)
        head = repository.resolve(branch)
        tree = dict(head.tree)
        title = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise HubRefusalError(412, None, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                data = self.objects.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    raise HubRefusalError(400, None, f"lfs pointer to missing object {value['oid']}")
                tree[value["path"]] = Blob(data, True)
            elif item["key"] == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise HubRefusalError(400, None, f"cannot delete {value['path']}: no such file")
            else:
                raise HubRefusalError(400, None, f"unknown operation {item['key']}")
        return repository.add_commit(branch, title, tree)
