"""A Hub, a mirror or somebody on the way to it that answers what it likes: typed errors, and nothing outside."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import file_download

from nvfp4_prep._util.printable import mask_passwords
from nvfp4_prep.commands.convert import convert
from nvfp4_prep.errors import HubError, NvfpPrepError, SourceError, TargetError, VerificationError
from nvfp4_prep.hub import open_source
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.hub.errors import Patience, persist
from nvfp4_prep.hub.range_source import RangeSource
from nvfp4_prep.hub.source import HubSource
from nvfp4_prep.publish.push import push
from support import hub_server
from support.hub_server import LoopbackHub, _Api
from support.hub_support import QUICK, make_checkpoint, shard, write_checkpoint

REPO = "alice/model"
NAME = "model.safetensors"
MAIN = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()"]
Change = Callable[[dict[str, Any]], object]


def forge(monkeypatch: pytest.MonkeyPatch, route: Any, change: Change) -> None:
    """Has the Hub change each of its own right answers."""

    def forged(self: _Api, *arguments: Any) -> Any:
        answer = route(self, *arguments)
        for item in answer if isinstance(answer, list) else [answer]:
            change(item)
        return answer

    routes = [(method, pattern, forged if known is route else known) for method, pattern, known in hub_server._ROUTES]
    monkeypatch.setattr(hub_server, "_ROUTES", routes)


def forge_listing(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    forge(monkeypatch, _Api.tree, change)


def forge_info(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    forge(monkeypatch, _Api.info, change)


@pytest.mark.parametrize(
    "oid",
    ["/x/y", "../../x", "a/b", "", "A" * 64, "g" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", 5, None, True, [], {}],
    ids=repr,
)
def test_an_lfs_hash_that_is_none_becomes_no_path(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, oid: object
) -> None:
    hub.store.publish(REPO, {NAME: shard(1000, 1)})
    forge_listing(monkeypatch, lambda item: item["lfs"].update(oid=oid))
    with pytest.raises(HubError, match=f"{REPO}/{NAME}: the LFS sha256 in the Hub's listing is malformed"):
        HubSource(HubAddress(REPO), work_dir=tmp_path / "work", patience=QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda item: item.update(size="x"),
        lambda item: item.update(size=None),
        lambda item: item.update(size=True),
        lambda item: item.update(size=1.5),
        lambda item: item.update(size=-1),
        lambda item: item.update(size=10**30),
        lambda item: item.pop("size"),
        lambda item: item.update(oid=5),
        lambda item: item.update(oid="../x"),
        lambda item: item.update(oid=None),
        lambda item: item.pop("oid"),
        lambda item: item.update(path=5),
        lambda item: item.pop("path"),
        lambda item: item.update(lfs=[1]),
        lambda item: item.update(lfs="x"),
        lambda item: item["lfs"].update(size="x"),
        lambda item: item["lfs"].pop("oid"),
        lambda item: item.pop("type"),
    ],
)
def test_listings_of_other_types(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    hub.store.publish(REPO, {NAME: shard(1000, 1)})
    forge_listing(monkeypatch, change)
    with pytest.raises((HubError, SourceError)) as caught:
        RangeSource(HubAddress(REPO), patience=QUICK)
    assert REPO in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("id"),
        lambda value: value.clear(),
        lambda value: value.update(sha=5),
        lambda value: value.update(sha="../../x"),
        lambda value: value.update(sha=None),
        lambda value: value.update(sha="main"),
        lambda value: value.update(siblings=5),
    ],
)
def test_repositories_of_other_types(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    hub.store.publish(REPO, {NAME: shard(1000, 1)})
    forge_info(monkeypatch, change)
    with pytest.raises(HubError, match=f"^{REPO}: .* in the Hub's listing is malformed"):
        RangeSource(HubAddress(REPO), patience=QUICK)


def test_endless_listings_end(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.publish(REPO, {NAME: shard(1000, 1), "other.safetensors": shard(1000, 2)})
    monkeypatch.setattr("nvfp4_prep.hub.listing._MAX_FILES", 1)
    with pytest.raises(HubError, match="number of files"):
        RangeSource(HubAddress(REPO), patience=QUICK)


def opened(hub: LoopbackHub, work: Path) -> HubSource:
    hub.store.publish(REPO, {NAME: shard(1000, 1)})
    return HubSource(HubAddress(REPO), work_dir=work, patience=QUICK)


@pytest.mark.parametrize("sha256", ["/tmp/x", "../x", "x"])
def test_the_path_of_a_download_is_checked_again(hub: LoopbackHub, tmp_path: Path, sha256: str) -> None:
    source = opened(hub, tmp_path / "w" / "source")
    file = replace(source.snapshot.files[NAME], sha256=sha256)
    with pytest.raises(HubError, match="malformed"):
        source._target(file)


@pytest.mark.parametrize("link", ["work", "source", "file", "partial", "xet"])
def test_links_in_the_work_folder_are_refused(hub: LoopbackHub, tmp_path: Path, link: str) -> None:
    """Whoever made the link: nothing behind it is read as ours, written or deleted."""
    outside = tmp_path / "outside"
    (outside / "source").mkdir(parents=True)
    (outside / "mine").write_bytes(b"mine")
    (outside / "source" / "mine").write_bytes(b"mine")
    work = tmp_path / "target" / ".nvfp4_prep"
    source = opened(hub, work / "source")
    digest = source.snapshot.files[NAME].sha256
    work.parent.mkdir()
    if link == "work":
        work.symlink_to(outside)
    else:
        work.mkdir()
    if link == "source":
        (work / "source").symlink_to(outside)
    elif link != "work":
        (work / "source").mkdir()
        ending = {"file": "", "partial": ".part", "xet": ".xet"}[link]
        behind = outside if link == "xet" else outside / "mine"
        (work / "source" / f"{digest}{ending}").symlink_to(behind)
    with pytest.raises(TargetError, match="is a symbolic link"):
        try:
            source.schedule([NAME])
            source.read_into(NAME, 0, memoryview(bytearray(8)))
        finally:
            source.close()
    assert (outside / "mine").read_bytes() == b"mine"
    assert sorted(path.name for path in outside.rglob("*")) == ["mine", "mine", "source"]


def test_a_pipe_in_the_place_of_a_download_hangs_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    source = opened(hub, tmp_path / "w" / "source")
    source.work_dir.mkdir(parents=True)  # type: ignore[union-attr]
    partial = tmp_path / "w" / "source" / f"{source.snapshot.files[NAME].sha256}.part"
    os.mkfifo(partial)
    done = threading.Event()

    def read() -> None:
        with pytest.raises((NvfpPrepError, OSError)):
            source.schedule([NAME])
            source.read_into(NAME, 0, memoryview(bytearray(8)))
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(20)
    source.close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET http://me:secret@host:1/x?y=a@b", "GET http://***@host:1/x?y=a@b"),
        ("https://token@host", "https://***@host"),
        ("https://host/a@b and a@b", "https://host/a@b and a@b"),
    ],
)
def test_passwords_of_addresses_are_masked(text: str, shown: str) -> None:
    assert mask_passwords(text) == shown


def start(*arguments: object, **environment: str) -> tuple[int, str, float]:
    begin = time.monotonic()
    done = subprocess.run(
        [*MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_XET": "1", **environment},
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("repository", [REPO, "alice/nothing"])
def test_a_password_in_the_endpoint_is_never_printed(hub: LoopbackHub, tmp_path: Path, repository: str) -> None:
    hub.store.publish(REPO, make_checkpoint(layers=1, shards=1) | {"config.json": b"{"})
    address = hub.url.replace("://", "://me:secret@")
    code, output, _ = start("inspect", repository, HF_ENDPOINT=address, HF_HOME=str(tmp_path))
    assert code != 0 and "secret" not in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("token", ["hf_gehéim", "hf_geh\u2026him"])
def test_a_token_that_cannot_be_sent(hub: LoopbackHub, tmp_path: Path, token: str) -> None:
    hub.store.publish(REPO, {NAME: shard(1000, 1)})
    code, output, seconds = start("inspect", REPO, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_TOKEN=token)
    assert code == 10 and "the access token has characters that no token has" in output, output
    assert "him" not in output and "Traceback" not in output and seconds < 20


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["ftp://host", "http://[x", "http://a b"])
def test_an_endpoint_that_is_no_address(tmp_path: Path, endpoint: str) -> None:
    code, output, seconds = start("inspect", REPO, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert code == 10 and "Traceback" not in output and seconds < 20, output


@pytest.mark.slow
def test_a_host_without_address_is_told_at_once(tmp_path: Path) -> None:
    code, output, seconds = start("inspect", REPO, HF_ENDPOINT="http://no.invalid", HF_HOME=str(tmp_path))
    assert code == 10 and seconds < 15, (seconds, output)
    assert "Check HF_ENDPOINT" in output and "continues where it stopped" not in output


@pytest.mark.slow
@pytest.mark.parametrize(("first", "limit_s"), [(True, 3.0), (False, 60.0)])
def test_patience_with_names_that_cannot_be_resolved(first: bool, limit_s: float) -> None:
    """Only where nothing has worked yet is a missing name final: later it is a bad night."""
    patience = Patience(first_wait_s=0.3, longest_wait_s=0.3, give_up_after_s=4.0)
    begin, stop = time.monotonic(), threading.Event()

    def fail() -> None:
        raise ConnectionError("no name") from socket.gaierror(-2, "Name or service not known")

    with pytest.raises(HubError) as caught:
        persist(fail, what="x", patience=patience.at_first_contact() if first else patience, stop=stop)
    assert (time.monotonic() - begin < 3.0) == first
    assert ("continues where it stopped" in str(caught.value)) != first


def test_a_mistyped_path_is_named_as_such(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    with pytest.raises(HubError, match=r"If a local path was meant: directory real has no nothere\."):
        open_source("real/nothere")
    with pytest.raises(HubError) as caught:
        open_source("unreal/nothere")
    assert "local path" not in str(caught.value)


@pytest.mark.parametrize("etag", ["/x/y", "../../x", ".hidden", "a/b", "x" * 300])
def test_an_etag_becomes_no_path_of_the_cache(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etag: str
) -> None:
    """The client names files of its cache after what the server sends."""
    hub.store.publish(REPO, {NAME: shard(1000, 1)})
    source = HubSource(HubAddress(REPO), keep_source=True, patience=QUICK)
    metadata = type("Metadata", (), {"etag": etag})()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *a, **k: metadata)
    with pytest.raises(HubError, match="the ETag in the Hub's listing is malformed"):
        source.downloader.fetch_to_cache(source.snapshot.files[NAME])


def test_a_file_that_the_manifest_does_not_describe_is_not_published(hub: LoopbackHub, tmp_path: Path) -> None:
    """Also without --full: small files are compared before they leave this machine, not only after."""
    out = convert(write_checkpoint(tmp_path / "source", make_checkpoint(layers=1, shards=1)), tmp_path / "out").path
    (out / "tokenizer.json").write_bytes(bytes((out / "tokenizer.json").stat().st_size))
    with pytest.raises(VerificationError, match="is not what the manifest says"):
        push(out, "alice/prepared", patience=QUICK)
    assert "tokenizer.json" not in hub.store.repositories["alice/prepared"].resolve("main").tree


@pytest.mark.parametrize("failures", [0, 1])
def test_a_folder_of_downloads_that_becomes_a_link_in_mid_run(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """The transfers go on in the folder that was opened; behind the link nothing is written or deleted."""
    hub.store.publish("alice/m", make_checkpoint(layers=2, experts=2, shards=1))
    victim = tmp_path / "victim"
    victim.mkdir()
    real, calls = file_download.http_get, 0

    def swapping(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            source = tmp_path / "out" / ".nvfp4_prep" / "source"
            with contextlib.suppress(FileExistsError, FileNotFoundError):  # the run itself makes and removes it
                source.rename(tmp_path / "moved")
                source.symlink_to(victim)
        if calls <= failures:
            raise ConnectionError("reset")
        real(*arguments, **options)

    monkeypatch.setattr(file_download, "http_get", swapping)
    with contextlib.suppress(NvfpPrepError):  # what it ends with depends on who is first
        convert("alice/m", tmp_path / "out", smoke=None)
    assert calls and not list(victim.iterdir())
