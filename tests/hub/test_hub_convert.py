"""Convert from the loopback Hub: the same bytes as from a directory, bounded disk, whatever the network does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.commands.convert import convert, plan
from nvfp4_prep.errors import HubError
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.source import HubSource
from support.hub_server import LoopbackHub
from support.hub_support import QUICK, Files, PeakWatch, make_checkpoint, read_folder, write_checkpoint

REPO = "alice/small-moe"
MADE = {MANIFEST, "README.md"}
"""They name the source, which is another one here."""


@pytest.fixture(scope="module")
def files() -> Files:
    return make_checkpoint()


@pytest.fixture(scope="module")
def local(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What converting the same files from a directory gives."""
    folder = tmp_path_factory.mktemp("local")
    source = write_checkpoint(folder / "source", files)
    convert(source, folder / "out")
    return {name: data for name, data in read_folder(folder / "out").items() if name not in MADE}


def hub_source(target: Path, **options: object) -> HubSource:
    options = {"work_dir": target / ".nvfp4_prep" / "source", "patience": QUICK, **options}
    return HubSource(HubAddress(REPO), **options)  # type: ignore[arg-type]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_dry_run_reads_headers_only(hub: LoopbackHub, files: Files) -> None:
    hub.store.publish(REPO, files)
    source = HubSource(HubAddress(REPO), patience=QUICK)
    made = plan(source)
    assert made.source_label == REPO
    assert made.source_revision == hub.store.repositories[REPO].heads["main"]
    assert len(made.layers) == 4
    assert {request.range for request in hub.requests("GET", "/objects/")} != {None}
    assert len(hub.requests("GET", "/objects/")) == 8
    source.close()


@pytest.mark.slow
def test_bytes_equal_the_local_conversion_though_a_quarter_of_the_shards_fail(
    hub: LoopbackHub, files: Files, local: Files, tmp_path: Path
) -> None:
    hub.store.publish(REPO, files)
    shards = [name for name in files if name.startswith("model-0")]
    for name, kind in zip(shards[::4], ("drop", "corrupt"), strict=True):
        hub.fault(digest(files[name]), kind, skip=2, after_bytes=100_000)  # two plannings come first
    target = tmp_path / "out"
    made = plan(hub_source(target))
    with PeakWatch(target / ".nvfp4_prep" / "source") as watch:
        convert(hub_source(target), target)
    assert [fault.times for fault in hub.faults] == [0, 0]
    out = read_folder(target)
    assert {name: data for name, data in out.items() if name not in MADE} == local
    assert not (target / ".nvfp4_prep").exists()
    largest = max(len(files[name]) for name in shards)
    total = sum(len(files[name]) for name in shards)
    room = hub_source(target).room_nbytes(made.shard_order(), made.peak_shards_nbytes)
    assert room == made.peak_shards_nbytes + 2 * largest < total
    assert largest < watch.peak_nbytes <= room


@pytest.mark.slow
def test_a_conversion_cut_off_by_the_network_continues(
    hub: LoopbackHub, files: Files, local: Files, tmp_path: Path
) -> None:
    hub.store.publish(REPO, files)
    target = tmp_path / "out"
    sixth = digest(files["model-00006-of-00008.safetensors"])
    hub.fault(sixth, "status", skip=1, status=500, times=10**6)
    with pytest.raises(HubError, match="without progress"):
        convert(hub_source(target, patience=Patience(0.01, 0.02, 0.1)), target)
    assert not (target / "config.json").exists()
    finished = {path.name for path in target.glob("*.safetensors")}
    assert finished
    hub.faults.clear()
    hub.log.clear()
    result = convert(hub_source(target), target)
    assert result.resumed
    assert {name: data for name, data in read_folder(target).items() if name not in MADE} == local
    first = digest(files["model-00001-of-00008.safetensors"])
    assert all(request.range for request in hub.requests("GET", first)), "a shard that was done came again"


def test_the_manifest_names_repository_and_commit(hub: LoopbackHub, files: Files, tmp_path: Path) -> None:
    commit = hub.store.publish(REPO, files)
    hub.store.publish(REPO, {**files, "config.json": b"{}"})
    target = tmp_path / "out"
    source = HubSource(HubAddress(REPO, commit.oid), work_dir=target / ".nvfp4_prep" / "source", patience=QUICK)
    manifest = convert(source, target).manifest
    assert (manifest.source, manifest.revision) == (REPO, commit.oid)
