"""A small Hugging Face Hub on loopback for the real client: HTTP as the Hub speaks it, with faults on demand.

Two servers: the Hub itself and, on a port of its own, the storage that large files are redirected to, so that tests see
what a real redirect does (the token must not travel along).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_store import HubRefusalError, Pull, Repository, Store

MULTIPART_NBYTES = 1 << 20
"""Uploads larger than this go in parts, as on the Hub (there: several MB)."""


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose method and path match.

    kinds: ``drop`` and ``reset`` end the connection after ``after_bytes`` of the body (politely or by RST), ``status``
    answers with an error, ``short`` serves a body without its last byte as if it were whole, ``corrupt`` flips a bit,
    ``stall`` waits ``seconds`` in mid-body, ``slow`` before the work, ``lost`` does the work but loses the answer,
    ``revoke`` makes all tokens invalid from here on, ``kill`` sends SIGKILL to ``hub.victim`` before the work,
    ``kill-after`` after it.
    """

    path: str
    kind: str
    method: str = "GET"
    times: int = 1
    skip: int = 0
    status: int = 503
    after_bytes: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One line of the log."""

    method: str
    path: str
    range: str | None
    body_nbytes: int


class LoopbackHub:
    """The Hub's state, its faults and its log."""

    def __init__(self) -> None:
        self.store = Store()
        self.tokens = {"hf_valid": "alice"}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.sent_nbytes: dict[str, int] = {}
        self.leaked_tokens: list[str] = []
        self.in_xet = False
        self.ignored = ""
        self.victim = 0
        self.halt = threading.Event()
        self.errors: list[BaseException | None] = []
        self.servers = [_Server(("127.0.0.1", 0), _handler(self, kind)) for kind in (_Api, _Storage)]
        for server in self.servers:
            server.errors = self.errors
        hub_port, storage_port = (server.server_address[1] for server in self.servers)
        self.url = f"http://127.0.0.1:{hub_port}"
        self.storage_url = f"http://localhost:{storage_port}"  # another host name: 1.x compares names, not ports

    def fault(self, path: str, kind: str, **options: Any) -> Fault:
        """Orders a fault."""
        fault = Fault(path, kind, **options)
        self.faults.append(fault)
        return fault

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (method, "*") and re.search(fault.path, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str, path: str) -> list[Request]:
        """The log's entries that match."""
        return [item for item in self.log if item.method == method and re.search(path, item.path)]


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """Runs a Hub for the length of the block."""
    hub = LoopbackHub()
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in hub.servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.halt.set()
        for server in hub.servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    errors: list[BaseException | None]
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what the tests are about; everything else is a mistake here."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, ValueError, TimeoutError)):
            self.errors.append(error)


def _handler(hub: LoopbackHub, kind: type[_Handler]) -> type[_Handler]:
    return type(kind.__name__, (kind,), {"hub": hub})


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the log is ``hub.log``."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(Request(self.command, path, self.headers.get("Range"), len(body)))
        self.current_fault = fault = self.hub.take_fault(self.command, path)
        if fault is not None and fault.kind == "status":
            return self.reply(fault.status, {"error": "on demand"}, fault.headers)
        if fault is not None and fault.kind == "revoke":
            self.hub.tokens.clear()
        if fault is not None and fault.kind == "slow":
            self.hub.halt.wait(fault.seconds)
        if fault is not None and fault.kind == "kill":
            os.kill(self.hub.victim, signal.SIGKILL)
            return self._hang_up(reset=False)
        if fault is not None and fault.kind == "reset" and fault.after_bytes == 0:
            return self._hang_up(reset=True)
        try:
            self.answer(path, body)
        except HubRefusalError as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.reply(refusal.status, {"error": refusal.message}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        return None

    def answer(self, path: str, body: bytes) -> None:
        raise NotImplementedError

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _hang_up(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        if not reset:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def reply(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        fault = self.current_fault
        if fault is not None and fault.kind in ("lost", "kill-after"):
            if fault.kind == "kill-after":
                os.kill(self.hub.victim, signal.SIGKILL)
            return self._hang_up(reset=False)
        if fault is not None and fault.kind == "short":
            data = data[:-1]
        if fault is not None and fault.kind == "corrupt" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault is not None and fault.kind in ("drop", "reset", "stall"):
            self.wfile.write(data[: fault.after_bytes])
            self.wfile.flush()
            self._count(fault.after_bytes)
            if fault.kind != "stall":
                time.sleep(0.05)  # lets the client take what was sent
                return self._hang_up(reset=fault.kind == "reset")
            time.sleep(fault.seconds)
            data = data[fault.after_bytes :]
        self.wfile.write(data)
        self._count(len(data))
        return None

    def _count(self, nbytes: int) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.store.lock:
            self.hub.sent_nbytes[path] = self.hub.sent_nbytes.get(path, 0) + nbytes

    def send_range(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.send_bytes(200, data, headers)
        begin = int(wanted[1])
        end = min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
        if begin >= len(data):
            return self.send_bytes(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        return self.send_bytes(
            206, data[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        )


class _Storage(_Handler):
    """Large objects: ``/objects/SHA256/FILE`` to read, ``/upload/SHA256[/PART]`` to write."""

    def answer(self, path: str, body: bytes) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked_tokens.append(path)
        kind, oid, *rest = path.strip("/").split("/")
        with self.hub.store.lock:
            if kind == "objects":
                data = self.hub.store.objects[oid]
            elif rest:
                self.hub.store.parts.setdefault(oid, {})[int(rest[0])] = body
                return self.send_bytes(200, b"", {"ETag": hashlib.md5(body).hexdigest()})
            else:
                self.hub.store.put_object(oid, body)
                return self.send_bytes(200, b"", {"ETag": hashlib.md5(body).hexdigest()})
        return self.send_range(data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


class _Api(_Handler):
    """The Hub's own routes."""

    def answer(self, path: str, body: bytes) -> None:
        for method, pattern, route in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                self.user = self._user()
                with self.hub.store.lock if self.command == "POST" else nullcontext():
                    answer = route(self, body, *match.groups())
                if answer is not None:
                    self.reply(200, answer)
                return
        raise HubRefusalError(404, None, f"no route {self.command} {path}")

    def _user(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubRefusalError(401, None, "Invalid credentials in Authorization header")
        return user

    def _readable(self, repo_id: str) -> Repository:
        repository = self.hub.store.repository(repo_id)
        if repository.private and self.user is None:
            raise HubRefusalError(401, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, repo_id: str) -> Repository:
        repository = self._readable(repo_id)
        if self.user != repo_id.split("/")[0]:
            raise HubRefusalError(403, None, f"Forbidden: you have no write access to {repo_id}")
        return repository

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> dict[str, Any]:
        repository = self._readable(repo_id)
        commit = repository.resolve(revision or "main")
        siblings = [{"rfilename": name} for name in sorted(commit.tree)]
        return {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repository.private,
                "gated": "manual" if repository.gated else False, "siblings": siblings, "tags": []}  # fmt: skip

    def tree(self, body: bytes, repo_id: str, revision: str) -> list[dict[str, Any]]:
        commit = self._readable(repo_id).resolve(revision)
        items = []
        for name, blob in sorted(commit.tree.items()):
            item: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.data), "oid": blob.git_oid}
            if blob.lfs:
                item["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
                if self.hub.in_xet:
                    item["xetHash"] = blob.sha256
            items.append(item)
        return items

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repository = self._readable(repo_id)
        if repository.gated and self.user != repo_id.split("/")[0]:
            raise HubRefusalError(403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        commit = repository.resolve(revision)
        blob = commit.tree.get(name)
        if blob is None:
            raise HubRefusalError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return self.send_range(blob.data, {**headers, "ETag": f'"{blob.git_oid}"'})
        location = f"{self.hub.storage_url}/objects/{blob.sha256}/{name}"
        if self.hub.in_xet:
            headers |= {"X-Xet-Hash": blob.sha256, "X-Xet-Refresh-Route": f"/api/models/{repo_id}/xet-read-token/x"}
        headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"', "Location": location}
        return self.send_bytes(302, b"", headers)

    def create(self, body: bytes) -> dict[str, Any]:
        wish = json.loads(body)
        owner = wish.get("organization") or self.user
        if self.user is None or owner != self.user:
            raise HubRefusalError(
                403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"'
            )
        repo_id = f"{owner}/{wish['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.hub.store.repositories:
            return self.reply(409, {"error": "You already created this model repo", **url})  # type: ignore[func-returns-value, return-value]
        self.hub.store.create(repo_id, bool(wish.get("private") or wish.get("visibility") == "private"))
        return url

    def preupload(self, body: bytes, repo_id: str, revision: str) -> dict[str, Any]:
        tree = self._writable(repo_id).resolve(revision).tree
        files = []
        for wish in json.loads(body)["files"]:
            blob = tree.get(wish["path"])
            mode = "lfs" if self.hub.store.is_large(wish["path"], wish["size"]) else "regular"
            ignored = bool(self.hub.ignored and re.search(self.hub.ignored, wish["path"]))
            oid = None if blob is None else (blob.sha256 if blob.lfs else blob.git_oid)
            files.append({"path": wish["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return {"files": files}

    def lfs_batch(self, body: bytes, repo_id: str) -> dict[str, Any]:
        self._writable(repo_id)
        objects = []
        for wish in json.loads(body)["objects"]:
            oid, size = wish["oid"], wish["size"]
            if oid in self.hub.store.objects:
                objects.append({"oid": oid, "size": size})
                continue
            upload: dict[str, Any] = {"href": f"{self.hub.storage_url}/upload/{oid}"}
            if size > MULTIPART_NBYTES:
                parts = {
                    str(number): f"{self.hub.storage_url}/upload/{oid}/{number}"
                    for number in range(1, -(-size // MULTIPART_NBYTES) + 1)
                }
                upload = {"href": f"{self.hub.url}/complete/{oid}"}
                upload["header"] = {"chunk_size": str(MULTIPART_NBYTES), **parts}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def complete(self, body: bytes, oid: str) -> dict[str, Any]:
        parts = self.hub.store.parts.pop(oid, {})
        if oid in self.hub.store.objects:
            return {"success": True}
        self.hub.store.put_object(oid, b"".join(parts[number] for number in sorted(parts)))
        return {"success": True}

    def commit(self, body: bytes, repo_id: str, revision: str) -> dict[str, Any]:
        self._writable(repo_id)
        commit = self.hub.store.commit(repo_id, revision, body)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.oid}"}

    def branch(self, body: bytes, repo_id: str, name: str) -> dict[str, Any]:
        repository = self._writable(repo_id)
        if name in repository.heads:
            raise HubRefusalError(409, None, "Reference already exists")
        repository.heads[name] = repository.resolve(json.loads(body or b"{}").get("startingPoint") or "main").oid
        return {"success": True}

    def refs(self, body: bytes, repo_id: str) -> dict[str, Any]:
        repository = self._readable(repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.heads.items()
            if not name.startswith("refs/")
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def discussions(self, body: bytes, repo_id: str) -> dict[str, Any]:
        repository = self._readable(repo_id)
        if self.command == "POST":
            pull = Pull(len(repository.pulls) + 1, json.loads(body)["title"])
            repository.pulls.append(pull)
            repository.heads[f"refs/pr/{pull.num}"] = repository.heads["main"]
            return {"num": pull.num}
        wanted = parse_qs(urlsplit(self.path).query)
        pulls = [pull for pull in repository.pulls if wanted.get("status", ["all"])[0] in ("all", "open")]
        return {"count": len(pulls), "start": 0, "discussions": [self._pull(repository, pull) for pull in pulls]}

    def discussion(self, body: bytes, repo_id: str, num: str) -> dict[str, Any]:
        repository = self._readable(repo_id)
        return self._pull(repository, repository.pulls[int(num) - 1])

    def _pull(self, repository: Repository, pull: Any) -> dict[str, Any]:
        return {"num": pull.num, "title": pull.title, "status": pull.status, "author": {"name": "alice"},
                "createdAt": "2026-11-23T00:00:00.000Z", "repo": {"name": repository.repo_id, "type": "model"},
                "isPullRequest": True, "events": [], "filesWithConflicts": [],
                "changes": {"base": "refs/heads/main"}}  # fmt: skip

    def validate_yaml(self, body: bytes) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def whoami(self, body: bytes) -> dict[str, Any]:
        if self.user is None:
            raise HubRefusalError(401, None, "Invalid credentials in Authorization header")
        return {"type": "user", "name": self.user, "orgs": []}


_REPO = r"([\w.-]+/[\w.-]+)"
_REV = r"((?:refs/pr/\d+)|[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", _Api.whoami),
    ("POST", "/api/repos/create", _Api.create),
    ("POST", "/api/validate-yaml", _Api.validate_yaml),
    ("GET", rf"/api/models/{_REPO}/revision/{_REV}", _Api.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REV}", _Api.tree),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REV}", _Api.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REV}", _Api.commit),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", _Api.branch),
    ("GET", rf"/api/models/{_REPO}/refs", _Api.refs),
    (("GET", "POST"), rf"/api/models/{_REPO}/discussions", _Api.discussions),
    ("GET", rf"/api/models/{_REPO}/discussions/(\d+)", _Api.discussion),
    ("GET", rf"/api/models/{_REPO}", _Api.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Api.lfs_batch),
    ("POST", r"/complete/(\w+)", _Api.complete),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REV}/(.+)", _Api.resolve),
)
