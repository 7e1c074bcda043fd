"""HubSource against the loopback Hub: planning by ranges, downloads that survive faults, bounded disk."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from nvfp4_prep.errors import HubError, SourceError, UsageError
from nvfp4_prep.hub.address import HubAddress, parse_address
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.source import HubSource
from support.cases import slow_after
from support.hub_server import LoopbackHub
from support.hub_support import QUICK, PeakWatch, folder_nbytes, shard

REPO = "alice/model"
SIZE = 600_000


@pytest.fixture
def shards(hub: LoopbackHub) -> dict[str, bytes]:
    files = {f"model-{number}.safetensors": shard(SIZE, number) for number in range(6)}
    hub.store.publish(REPO, {**files, "config.json": b'{"a": 1}', "code/x.py": b"pass\n", "big.txt": b"t" * 70_000})
    return files


def open_source(tmp_path: Path, **options: object) -> HubSource:
    options = {"work_dir": tmp_path / "work", "patience": QUICK, **options}
    return HubSource(HubAddress(REPO), **options)  # type: ignore[arg-type]


def read(source: HubSource, name: str, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    half = nbytes // 2
    source.read_into(name, 0, memoryview(buffer)[:half])
    source.read_into(name, half, memoryview(buffer)[half:])
    return bytes(buffer)


def read_all(source: HubSource, shards: dict[str, bytes]) -> None:
    source.schedule(list(shards))
    for name, content in shards.items():
        assert read(source, name, len(content)) == content
        source.release(name)


def storage_path(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nvidia/Kimi-K2.5-NVFP4", HubAddress("nvidia/Kimi-K2.5-NVFP4")),
        ("org/name@v1.0", HubAddress("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubAddress("org/name", "refs/pr/3")),
        ("hf://org/name", HubAddress("org/name")),
        ("hf://models/org/name@main", HubAddress("org/name", "main")),
        ("./org/name", None),
        ("/abs/path", None),
        ("name", None),
        ("a/b/c", None),
        ("../b", None),
        ("org/na..me", None),
    ],
)
def test_addresses(text: str, expected: HubAddress | None) -> None:
    assert parse_address(text) == expected


def test_an_existing_path_wins_and_the_scheme_overrules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_address("org/name") is None
    assert parse_address("hf://org/name") == HubAddress("org/name")
    with pytest.raises(UsageError, match="hf://ORG/NAME"):
        parse_address("hf://name-alone")


# ---------------------------------------------------------------------- planning


def test_planning_downloads_no_weights(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    source = HubSource(HubAddress(REPO, "main"), patience=QUICK)
    assert source.revision == hub.store.repositories[REPO].heads["main"]
    assert [file.name for file in source.files()] == sorted([*shards, "big.txt", "code/x.py", "config.json"])
    assert source.peek("config.json", 0, 8) == b'{"a": 1}'
    for name, content in shards.items():
        header = source.header(name)
        assert header.file_nbytes == len(content)
        assert [record.name for record in header.tensors] == [f"tensor.{name[6]}"]
    assert len(hub.requests("GET", "/objects/")) == len(shards)
    assert all(request.range for request in hub.requests("GET", "/objects/"))
    with pytest.raises(SourceError, match="no place was given"):
        read(source, "model-0.safetensors", 16)
    source.close()


def test_header_longer_than_the_first_request(
    hub: LoopbackHub,
    shards: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nvfp4_prep.hub.range_source._HEAD_NBYTES", 100)
    source = open_source(tmp_path)
    assert source.header("model-3.safetensors").tensors[0].nbytes == SIZE
    assert source.peek("model-3.safetensors", 5000, 77) == shards["model-3.safetensors"][5000:5077]
    read_all(source, shards)
    source.close()


def test_range_answers_are_compared_with_the_whole_file(
    hub: LoopbackHub,
    shards: dict[str, bytes],
    tmp_path: Path,
) -> None:
    hub.fault(storage_path(shards["model-0.safetensors"]), "corrupt")
    source = open_source(tmp_path)
    source.header("model-1.safetensors")
    source.peek("model-0.safetensors", 0, len(shards["model-0.safetensors"]))
    with pytest.raises(SourceError, match="planned, arrived damaged"):
        read_all(source, shards)
    source.close()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a\\b"])
def test_unsafe_names_are_refused(hub: LoopbackHub, name: str) -> None:
    hub.store.publish(REPO, {name: b"x"})
    with pytest.raises(SourceError, match="unsafe file name"):
        HubSource(HubAddress(REPO), patience=QUICK)


# ---------------------------------------------------------------------- access


@pytest.mark.parametrize(
    ("prepare", "address", "message"),
    [
        (lambda hub: None, HubAddress("alice/nothing"), r"alice/nothing: does not exist.*hf auth login"),
        (lambda hub: None, HubAddress(REPO, "v9"), r"alice/model@v9: has no such revision.*branch"),
        (lambda hub: hub.tokens.clear(), HubAddress(REPO), r"token is invalid or has expired.*hf auth login"),
        (lambda hub: None, HubAddress("alice/a--b"), r"is not a valid repository id"),
    ],
)
def test_refusals_name_the_next_step(
    hub: LoopbackHub,
    shards: dict[str, bytes],
    prepare: object,
    address: HubAddress,
    message: str,
) -> None:
    prepare(hub)  # type: ignore[operator]
    with pytest.raises((HubError, UsageError), match=message):
        HubSource(address, patience=QUICK)


def test_private_and_gated_repositories(
    hub: LoopbackHub,
    shards: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = hub.store.repositories[REPO]
    repository.private = True
    open_source(tmp_path).close()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="private and your token cannot see it"):
        open_source(tmp_path)
    repository.private, repository.gated = False, True
    source = open_source(tmp_path)
    with pytest.raises(HubError, match=r"gated.*Ask for access"):
        source.header("model-0.safetensors")
    source.close()


def test_offline_mode_says_so(hub: LoopbackHub, shards: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        HubSource(HubAddress(REPO), patience=QUICK)


def test_a_hub_that_stays_away(hub: LoopbackHub, shards: dict[str, bytes]) -> None:
    hub.fault("/api/models", "status", status=503, times=1000)
    with pytest.raises(HubError, match=r"without progress.*Run the same command again\."):
        HubSource(HubAddress(REPO), patience=Patience(0.01, 0.02, 0.05))


def test_a_token_that_expires_between_shards(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    source = open_source(tmp_path)
    hub.fault("model-3", "revoke")
    source.schedule(list(shards))
    with pytest.raises(HubError, match=r"expired.*continues"):
        for name, content in shards.items():
            assert read(source, name, len(content)) == content
            source.release(name)
    source.close()
    hub.tokens["hf_valid"] = "alice"
    again = open_source(tmp_path)
    read_all(again, {name: shards[name] for name in list(shards)[2:]})
    again.close()


# ---------------------------------------------------------------------- downloads


def test_shards_come_whole_and_go(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    source = open_source(tmp_path)
    read_all(source, shards)
    assert read(source, "code/x.py", 5) == b"pass\n"
    source.close()
    assert not (tmp_path / "work").exists()
    assert sum(hub.sent_nbytes.values()) < sum(map(len, shards.values())) + 80_000


FAULTS = {
    "dropped": {"kind": "drop", "after_bytes": 300_000},
    "one byte short": {"kind": "short"},
    "corrupt": {"kind": "corrupt"},
    "reset": {"kind": "reset", "after_bytes": 200_000},
    "refused": {"kind": "reset"},
    "rate limited": {"kind": "status", "status": 429, "headers": {"Retry-After": "0"}},
    "server error": {"kind": "status", "status": 500},
    "unavailable": {"kind": "status", "status": 503, "times": 4},
    "stalled": {"kind": "stall", "after_bytes": 200_000, "seconds": 2.5},
}


@pytest.mark.parametrize("name", slow_after(3, FAULTS))
def test_faults_cost_time_only(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path, name: str) -> None:
    for content in list(shards.values())[::2]:
        hub.fault(storage_path(content), **FAULTS[name])  # type: ignore[arg-type]
    source = open_source(tmp_path)
    read_all(source, shards)
    source.close()
    assert all(fault.times == 0 for fault in hub.faults), "a fault did not happen: the test shows nothing"


@pytest.mark.parametrize("kind", slow_after(1, ["drop", "reset", "stall"]))
def test_transfers_resume_within_a_file(
    hub: LoopbackHub,
    shards: dict[str, bytes],
    tmp_path: Path,
    kind: str,
) -> None:
    content = shards["model-0.safetensors"]
    hub.fault(storage_path(content), kind, after_bytes=400_000, seconds=2.5)
    source = open_source(tmp_path)
    read_all(source, {"model-0.safetensors": content})
    source.close()
    ranges = [request.range for request in hub.requests("GET", f"/objects/{storage_path(content)}")]
    assert ranges[0] is None
    assert ranges[1] is not None
    resumed_at = int(ranges[1].removeprefix("bytes=").rstrip("-"))
    assert resumed_at >= 400_000 - (1 << 16)


def test_a_second_run_goes_on_inside_the_file(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    content = shards["model-0.safetensors"]
    path = storage_path(content)
    hub.fault(path, "drop", after_bytes=400_000)
    hub.fault(path, "status", status=500, times=1000)
    first = open_source(tmp_path, patience=Patience(0.01, 0.02, 0.1))
    with pytest.raises(HubError, match="without progress"):
        read_all(first, {"model-0.safetensors": content})
    first.close()
    hub.faults.clear()
    hub.log.clear()
    second = open_source(tmp_path)
    read_all(second, {"model-0.safetensors": content})
    second.close()
    (request,) = hub.requests("GET", f"/objects/{path}")
    assert request.range is not None
    assert request.range != "bytes=0-"


def test_bytes_that_stay_wrong_are_never_used(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    content = shards["model-0.safetensors"]
    hub.fault(storage_path(content), "corrupt", times=1000)
    source = open_source(tmp_path)
    with pytest.raises(HubError, match="never with the listed hash") as caught:
        read_all(source, {"model-0.safetensors": content})
    assert storage_path(content) in str(caught.value)
    source.close()
    assert list((tmp_path / "work").glob("*")) == [] if (tmp_path / "work").exists() else True


@pytest.mark.parametrize("fault", ["corrupt", "short"])
def test_small_files_are_checked_too(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path, fault: str) -> None:
    hub.fault("config.json", fault)
    source = open_source(tmp_path)
    assert source.peek("config.json", 0, 8) == b'{"a": 1}'
    hub.fault("x.py", fault, times=1000)
    with pytest.raises(HubError):
        open_source(tmp_path, patience=Patience(0.01, 0.02, 0.05)).peek("code/x.py", 0, 5)
    source.close()


# ---------------------------------------------------------------------- disk and cache


def test_disk_is_bounded(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    with PeakWatch(tmp_path / "work") as watch:
        source = open_source(tmp_path, ahead=2)
        source.schedule(list(shards))
        for name, content in shards.items():
            assert read(source, name, len(content)) == content
            time.sleep(0.05)  # lets the shards ahead arrive
            source.release(name)
        source.close()
    one = len(shards["model-0.safetensors"])
    assert source.room_nbytes(list(shards), 0) == 3 * one
    assert 2 * one <= watch.peak_nbytes <= 3 * one


def test_leftovers_of_another_source_go(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "0123.xet").mkdir(parents=True)
    (work / "0123.xet" / "x").write_bytes(b"x")
    (work / "4567.part").write_bytes(b"x")
    kept = work / storage_path(shards["model-1.safetensors"])
    kept.write_bytes(shards["model-1.safetensors"])
    damaged = work / storage_path(shards["model-2.safetensors"])
    damaged.write_bytes(bytes(len(shards["model-2.safetensors"])))
    source = open_source(tmp_path)
    read_all(source, shards)
    source.close()
    assert not work.exists()
    assert not hub.requests("GET", storage_path(shards["model-1.safetensors"]))
    assert hub.requests("GET", storage_path(shards["model-2.safetensors"]))


def test_keep_source_fills_the_cache_and_the_next_run_reads_it(
    hub: LoopbackHub,
    shards: dict[str, bytes],
    tmp_path: Path,
) -> None:
    source = open_source(tmp_path, keep_source=True)
    read_all(source, shards)
    source.close()
    assert not (tmp_path / "work").exists()
    assert folder_nbytes(tmp_path / "hf-cache") >= sum(map(len, shards.values()))
    hub.log.clear()
    again = open_source(tmp_path)
    assert again.header("model-2.safetensors").tensors[0].nbytes == SIZE
    read_all(again, shards)
    again.close()
    assert not hub.requests("GET", "/objects/")
    assert folder_nbytes(tmp_path / "hf-cache") >= sum(map(len, shards.values()))


def test_a_damaged_cache_is_not_trusted(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    source = open_source(tmp_path, keep_source=True)
    read_all(source, shards)
    source.close()
    damaged = next((tmp_path / "hf-cache").rglob("snapshots/*/model-4.safetensors")).resolve()
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    for options in ({}, {"keep_source": True}):
        again = open_source(tmp_path, **options)  # type: ignore[arg-type]
        read_all(again, shards)
        again.close()
    assert damaged.read_bytes() == shards["model-4.safetensors"]


def test_xet_that_fails_gives_way_to_plain_http(
    hub: LoopbackHub,
    shards: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("nvfp4_prep.hub.download.importlib.util.find_spec", lambda name: object())
    hub.in_xet = True
    source = open_source(tmp_path)
    read_all(source, shards)
    source.close()
    assert not (tmp_path / "work").exists()
    assert "using plain HTTP" in caplog.text


def test_close_stops_a_transfer(hub: LoopbackHub, shards: dict[str, bytes], tmp_path: Path) -> None:
    hub.fault(storage_path(shards["model-0.safetensors"]), "status", status=500, times=10**6)
    source = open_source(tmp_path, patience=Patience(30.0, 60.0, 3600.0))
    source.schedule(["model-0.safetensors"])
    while not hub.requests("GET", "/objects/"):
        time.sleep(0.01)
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 5
