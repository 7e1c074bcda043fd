"""Straight through: from a source to a published checkpoint, with room for a few files only."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.convert import ConvertResult, convert, plan
from nvfp4_prep.errors import ConversionInterrupted, HubError, TargetError, VerificationError
from nvfp4_prep.hub.address import HubAddress
from nvfp4_prep.hub.errors import Patience
from nvfp4_prep.hub.source import HubSource
from nvfp4_prep.options import ConvertOptions, GateUpPolicy
from nvfp4_prep.output.sink import FILES_AT_ONCE, stream_room_nbytes
from nvfp4_prep.publish.push import PushResult
from nvfp4_prep.publish.stream import convert_and_publish
from support.hub_server import LoopbackHub
from support.hub_store import Blob
from support.hub_support import (
    QUICK,
    Files,
    PeakWatch,
    assert_never_half,
    make_checkpoint,
    read_folder,
    write_checkpoint,
)

pytestmark = pytest.mark.default_smoke

SOURCE = "alice/small-moe"
REPO = "alice/prepared"
LAYERS = 8
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the client's own
]


@pytest.fixture(scope="module")
def files() -> Files:
    return make_checkpoint(layers=LAYERS, shards=16)


@pytest.fixture
def local(files: Files, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "local", files)


@pytest.fixture
def expected(local: Path, tmp_path: Path) -> Files:
    convert(local, tmp_path / "expected")
    return read_folder(tmp_path / "expected")


def go(
    source: Path | Source, target: Path, patience: Patience = QUICK, **options: object
) -> tuple[ConvertResult, PushResult | None]:
    return convert_and_publish(source, target, REPO, patience=patience, **options)  # type: ignore[arg-type]


def published(hub: LoopbackHub) -> Files:
    tree = hub.store.repositories[REPO].resolve("main").tree
    return {name: blob.data for name, blob in tree.items() if name != ".gitattributes"}


def test_published_while_converting(hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path) -> None:
    result, pushed = go(local, tmp_path / "out")
    assert not result.already_complete
    assert read_folder(tmp_path / "out") == expected
    assert published(hub) == expected
    assert assert_never_half(hub.store.repositories[REPO]) == 1
    assert pushed is not None
    assert pushed.commit == hub.store.repositories[REPO].heads["main"]
    again, pushed_again = go(local, tmp_path / "out")
    assert again.already_complete
    assert pushed_again is not None
    assert pushed_again.commit == pushed.commit


def test_stream_out_needs_room_for_a_few_files(hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path) -> None:
    hub.fault("/upload/", "slow", method="PUT", seconds=0.2, times=10**6)
    target = tmp_path / "out"
    with PeakWatch(target) as watch:
        go(local, target, stream_out=True)
    assert published(hub) == expected
    weights = {name: len(data) for name, data in expected.items() if name.endswith(".safetensors")}
    small = sum(len(data) for name, data in expected.items() if name not in weights)
    largest = max(weights.values())
    # Journal and small files come on top of the files at once.
    assert largest < watch.peak_nbytes <= FILES_AT_ONCE * largest + 2 * small + 100_000
    assert watch.peak_nbytes < sum(weights.values()) / 2, "not bounded at all: the test shows nothing"
    assert not list(target.glob("*.safetensors"))
    assert assert_never_half(hub.store.repositories[REPO]) == 1


def test_from_hub_to_hub_within_the_planned_disk(hub: LoopbackHub, files: Files, tmp_path: Path) -> None:
    hub.store.publish(SOURCE, files)
    target = tmp_path / "out"
    source = HubSource(HubAddress(SOURCE), work_dir=target / ".nvfp4_prep" / "source", patience=QUICK)
    made = plan(source)
    sizes = {file.name: file.nbytes for file in made.files} | {file.name: file.nbytes for file in made.side_files}
    room = stream_room_nbytes(sizes) + source.room_nbytes(made.shard_order(), made.peak_shards_nbytes)
    with PeakWatch(target) as watch:
        go(source, target, stream_out=True)
    tree = published(hub)
    assert json.loads(tree["nvfp4_prep.json"])["source"]["name"] == SOURCE
    on_top = 200_000  # journal, manifest, configs: the plan does not count them
    assert watch.peak_nbytes <= room + on_top
    assert room + on_top < sum(map(len, tree.values())) + sum(map(len, files.values()))
    assert assert_never_half(hub.store.repositories[REPO]) == 1


@pytest.mark.parametrize("stream_out", [False, True])
def test_cut_off_and_continued(
    hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path, stream_out: bool
) -> None:
    hub.fault("/commit/", "status", method="POST", skip=1, status=503, times=10**6)
    with pytest.raises(HubError, match="without progress"):
        go(local, tmp_path / "out", Patience(0.01, 0.02, 0.1), stream_out=stream_out)
    assert not stream_out or not (tmp_path / "out" / "config.json").exists()
    hub.faults.clear()
    before = set(published(hub))
    here = {path.name for path in (tmp_path / "out").iterdir()}
    assert bool(before - here) == stream_out
    result, _ = go(local, tmp_path / "out", stream_out=stream_out)
    assert result.resumed or result.already_complete
    planned = [name for name in expected if name.endswith(".safetensors") or name == "tokenizer.json"]
    assert result.written_nbytes == sum(len(expected[name]) for name in planned if name not in before | here)
    assert published(hub) == expected
    assert before
    assert assert_never_half(hub.store.repositories[REPO]) == 1
    assert (read_folder(tmp_path / "out") == expected) == (not stream_out)


def test_streamed_out_and_killed_before_the_stamp(
    hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*args: object, **options: object) -> None:
        raise ConversionInterrupted("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr("nvfp4_prep.publish.stream.publish", cut)
        with pytest.raises(ConversionInterrupted):
            go(local, tmp_path / "out", stream_out=True)
    assert "config.json" not in published(hub)
    result, _ = go(local, tmp_path / "out", stream_out=True)
    assert result.already_complete
    assert published(hub) == expected


def test_streamed_out_files_come_back_where_they_are_wanted(
    hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path
) -> None:
    hub.fault("/commit/", "status", method="POST", skip=1, status=400, times=10**6)
    with pytest.raises(HubError):
        go(local, tmp_path / "out", stream_out=True)
    hub.faults.clear()
    go(local, tmp_path / "out")
    assert read_folder(tmp_path / "out") == expected
    assert published(hub) == expected


def test_what_somebody_else_changed_is_made_again(
    hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path
) -> None:
    hub.fault("/commit/", "status", method="POST", skip=1, status=400, times=10**6)
    with pytest.raises(HubError):
        go(local, tmp_path / "out", stream_out=True)
    hub.faults.clear()
    tree = dict(hub.store.repositories[REPO].resolve("main").tree)
    changed = [name for name in tree if name.endswith(".safetensors")]
    assert changed
    other = {name: Blob(bytes(len(tree[name].data)), True) for name in changed}
    hub.store.repositories[REPO].add_commit("main", "somebody else's", {**tree, **other})
    go(local, tmp_path / "out", stream_out=True)
    assert published(hub) == expected


def test_what_the_repository_lost_is_made_again(hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path) -> None:
    hub.fault("/commit/", "status", method="POST", skip=1, status=400, times=10**6)
    with pytest.raises(HubError):
        go(local, tmp_path / "out", stream_out=True)
    hub.faults.clear()
    del hub.store.repositories[REPO]
    hub.store.objects.clear()
    result, _ = go(local, tmp_path / "out", stream_out=True)
    assert result.resumed
    assert published(hub) == expected


def test_what_is_not_accepted_is_not_stamped(
    hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *rest: object) -> None:
        raise VerificationError("the smoke test failed", where=str(path))

    with monkeypatch.context() as patch, pytest.raises(VerificationError):
        patch.setattr("nvfp4_prep.pipeline.runner.pass_smoke_run", refuse)
        go(local, tmp_path / "out")
    assert "config.json" not in published(hub)
    go(local, tmp_path / "out")
    assert published(hub) == expected


def test_a_file_that_the_hub_ignores_is_not_deleted_here(hub: LoopbackHub, local: Path, tmp_path: Path) -> None:
    hub.ignored = r"experts-layer-00003"
    with pytest.raises(HubError, match=r"published file is missing.*gitignore"):
        go(local, tmp_path / "out", stream_out=True)
    assert (tmp_path / "out" / "experts-layer-00003.safetensors").is_file()


def test_rights_and_foreign_files_are_checked_before_converting(hub: LoopbackHub, local: Path, tmp_path: Path) -> None:
    hub.store.publish(REPO, {"model-00001-of-00099.safetensors": b"x", "config.json": b"{}"})
    with pytest.raises(TargetError, match="holds another model"):
        go(local, tmp_path / "out")
    del hub.store.repositories[REPO]
    hub.store.publish(REPO, {"modeling_x.py": b"x"})
    with pytest.raises(TargetError, match="do not belong to this checkpoint"):
        go(local, tmp_path / "out")
    hub.tokens["hf_valid"] = "bob"
    del hub.store.repositories[REPO]
    with pytest.raises(HubError, match="refused access"):
        go(local, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_new_version_over_an_old_one_is_never_mixed(
    hub: LoopbackHub, local: Path, expected: Files, tmp_path: Path
) -> None:
    go(local, tmp_path / "old", options=ConvertOptions(gate_up_scales=GateUpPolicy.VLLM, moe_tp=2))
    go(local, tmp_path / "out", stream_out=True)
    assert published(hub) == expected
    assert assert_never_half(hub.store.repositories[REPO]) == 2


def test_a_failed_conversion_does_not_wait_for_uploads(
    hub: LoopbackHub, files: Files, local: Path, tmp_path: Path
) -> None:
    broken = local / "model-00016-of-00016.safetensors"
    hub.fault("/upload/", "slow", method="PUT", seconds=30.0, times=10**6)

    class Breaks:
        """A source whose last shard vanishes while it is read."""

        def __init__(self, inner: Source) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def read_into(self, file: str, offset_bytes: int, buffer: memoryview) -> None:
            if file == broken.name:
                raise HubError("gone", where=file)
            self.inner.read_into(file, offset_bytes, buffer)

    from nvfp4_prep.checkpoint.local_source import LocalSource

    began = time.monotonic()
    with pytest.raises(HubError, match="gone"):
        go(Breaks(LocalSource(local)), tmp_path / "out")  # type: ignore[arg-type]
    assert time.monotonic() - began < 15
    hub.halt.set()
    for thread in threading.enumerate():
        if thread.name == "nvfp4-prep-push":
            thread.join(20)
