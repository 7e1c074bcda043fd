"""Whatever a caller gives the loader: a typed error of one line, or the right bytes."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_prep import load_layer as load_ready
from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.checkpoint.small_files import MAX_SMALL_NBYTES
from nvfp4_prep.errors import CheckpointError, LoadError, UsageError
from nvfp4_prep.load import Catalog, ExpertLoader, LoadOptions, RankShare, load_layer, load_layers
from nvfp4_prep_kernels import MoeDims, PreparedTensor, rank_slice
from support.load_files import Written, write_checkpoint

DIMS = MoeDims(experts=4, intermediate=256, hidden=256)
SMALL = LoadOptions(threads=2, chunk_nbytes=65536)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_checkpoint(tmp_path, DIMS)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"device": "nonsense"}, UsageError, "is not a device"),
        ({"device": "cuda:x"}, UsageError, "is not a device"),
        ({"device": None}, UsageError, "is not a device"),
        ({"device": 0}, UsageError, "is not a device"),
        ({"device": "meta"}, LoadError, "cannot load to this device"),
        ({"experts": (0.5,)}, UsageError, "experts are not whole numbers"),
        ({"experts": (True,)}, UsageError, "experts are not whole numbers"),
        ({"experts": "01"}, UsageError, "experts are not whole numbers"),
        ({"experts": 1}, UsageError, "experts are not whole numbers"),
        ({"experts": (None,)}, UsageError, "experts are not whole numbers"),
        ({"tp": (0,)}, UsageError, "tp is not a rank"),
        ({"tp": 1}, UsageError, "tp is not a rank"),
        ({"tp": (0.0, 1.0)}, UsageError, "tp is not a rank"),
        ({"ep": ("0", "1")}, UsageError, "ep is not a rank"),
        ({"ep": (2, 2)}, UsageError, "no rank 2 of 2"),
        ({"ep": (0, 0)}, UsageError, "no rank 0 of 0"),
        ({"ep": (-1, 2)}, UsageError, "no rank -1 of 2"),
        ({"layer": True}, UsageError, "is not a layer"),
        ({"layer": 1.0}, UsageError, "is not a layer"),
        ({"layer": None}, UsageError, "is not a layer"),
        ({"layer": 7}, UsageError, "no prepared layer 7"),
        ({"path": None}, UsageError, "argument path is wrong; expected a path, found None"),
        ({"path": b"x"}, UsageError, "argument path is wrong"),
        ({"path": "a\0b"}, UsageError, "it holds a NUL character"),
        ({"path": "/nowhere"}, CheckpointError, "does not exist"),
        ({"options": {"threads": 1}}, UsageError, "argument options is wrong"),
    ],
)
@pytest.mark.parametrize("load", [load_layer, load_ready])
def test_arguments(
    written: Written, load: Callable[..., Any], arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load(**{"path": written.root, "layer": 1, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_no_cuda(written: Written, device: object) -> None:
    with pytest.raises(LoadError, match="CUDA is not available"):
        load_layer(written.root, 1, device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("experts", [[2, 0], torch.tensor([2, 0]), (index for index in (2, 0))])
def test_whole_numbers_of_any_kind(written: Written, experts: Any) -> None:
    loaded = load_layer(written.root, 1, experts=experts, options=SMALL)
    assert loaded.share.experts == (2, 0)
    whole = written.tensors[1]["w2_weight"]
    assert torch.equal(loaded.tensors["w2_weight"], whole[[2, 0]])


@pytest.mark.parametrize("options", [{"threads": 10**6}, {"buffers": 10**9}, {"chunk_nbytes": 2**62}])
def test_options_beyond_reason(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unusable option of the loader"):
        LoadOptions(**options)


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(1, 1), ("0", 1), (0, 0), (0, True)])
def test_share(tp_rank: Any, tp_size: Any) -> None:
    with pytest.raises(UsageError):
        RankShare(None, tp_rank, tp_size)


def test_a_manifest_without_the_scales(written: Written) -> None:
    manifest = json.loads((written.root / MANIFEST).read_text())
    del manifest["files"]["expert-scales.safetensors"]
    (written.root / MANIFEST).write_text(json.dumps(manifest))
    for verify in (False, True):
        with pytest.raises(CheckpointError, match="expert-scales"):
            load_layer(written.root, 1, options=LoadOptions(threads=1, verify=verify))


@pytest.mark.parametrize("file", [MANIFEST, "expert-scales.safetensors", "experts-layer-00001.safetensors"])
@pytest.mark.parametrize("what", ["fifo", "device", "folder"])
@pytest.mark.parametrize("verify", [False, True])
def test_what_is_not_a_regular_file(written: Written, file: str, what: str, verify: bool) -> None:
    """No FIFO is waited for, no endless device read."""
    path = written.root / file
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match=f"{file}(:| that) is not a regular file"):
        load_layer(written.root, 1, options=LoadOptions(threads=1, verify=verify))


def test_a_manifest_too_large_to_be_one(written: Written) -> None:
    os.truncate(written.root / MANIFEST, MAX_SMALL_NBYTES + 1)
    expected = f"is too large; expected at most {MAX_SMALL_NBYTES} bytes, found {MAX_SMALL_NBYTES + 1} bytes"
    with pytest.raises(CheckpointError, match=expected):
        Catalog.open(written.root)


def test_a_checkpoint_whose_smoke_run_failed_is_not_opened(written: Written) -> None:
    """It has everything but the config, which is kept back: the catalog and both loaders agree."""
    (written.root / "config.json").unlink()
    for read in (Catalog.open, lambda root: load_layer(root, 1), lambda root: load_ready(root, 1)):
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
            read(written.root)


@pytest.fixture
def no_descriptors() -> Iterator[Callable[[int], None]]:
    """Leaves the process this many descriptors more than it has now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> None:
        probe = os.open(os.devnull, os.O_RDONLY)
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe + more, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("more", [0, 1])
def test_no_descriptors(written: Written, no_descriptors: Callable[[int], None], more: int) -> None:
    """None at all, or one, which the experts' file takes so that the scale vectors have none."""
    catalog = Catalog.open(written.root)
    with ExpertLoader("cpu", SMALL) as loader:
        no_descriptors(more)
        with pytest.raises(LoadError, match="Too many open files"):
            load_layers(catalog, catalog.manifest.layers, RankShare(), loader)
        if not more:
            with pytest.raises(LoadError, match="Too many open files"):
                Catalog.open(written.root)


def test_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "nvfp4-load-read-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(LoadError, match=r"only 1 of 2 threads could be started .can't start new thread"):
        ExpertLoader("cpu", SMALL)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nvfp4-load")]


def submit(loader: ExpertLoader, written: Written) -> torch.Tensor:
    record = Catalog.open(written.root).records(written.manifest.layers[0])["w2_weight"]
    part = rank_slice(written.layout, PreparedTensor.W2_WEIGHT, DIMS, 0, 1)
    parameter = torch.empty(DIMS.experts, *part.shape, dtype=torch.uint8)
    loader.submit(written.root / record.file, record, part, range(DIMS.experts), parameter)
    return parameter


def in_thread(call: Callable[[], Any]) -> BaseException | None:
    """What a call raises in a thread of its own."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def test_a_loader_in_use_by_another_thread(written: Written) -> None:
    with ExpertLoader("cpu", SMALL) as loader:
        parameter = submit(loader, written)
        for call in (loader.finish, lambda: submit(loader, written)):
            error = in_thread(call)
            assert isinstance(error, LoadError)
            assert "in use by another thread" in str(error)
        assert in_thread(loader.abandon) is None  # not its load: nothing happens
        loader.finish()
        assert torch.equal(parameter, written.tensors[1]["w2_weight"])
        assert in_thread(lambda: (submit(loader, written), loader.finish())) is None  # one after the other is fine


def test_many_threads_one_loader(written: Written) -> None:
    """Right bytes or a typed error, and the loader is usable afterwards."""
    catalog = Catalog.open(written.root)
    errors: list[BaseException] = []
    with ExpertLoader("cpu", SMALL) as loader:

        def work() -> None:
            for _ in range(20):
                try:
                    loaded, _ = load_layers(catalog, catalog.manifest.layers, RankShare(), loader)
                except LoadError as error:
                    assert "in use" in str(error), error
                except BaseException as error:
                    errors.append(error)
                else:
                    same = [torch.equal(loaded[0].tensors[it], written.tensors[1][it]) for it in ("w13_weight",)]
                    errors.extend([] if all(same) else [AssertionError("wrong bytes")])

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not errors
        load_layers(catalog, catalog.manifest.layers, RankShare(), loader)


def test_close_by_another_thread_ends_a_load(written: Written) -> None:
    hold = threading.Event()
    loader = ExpertLoader("cpu", LoadOptions(threads=1, chunk_nbytes=65536), progress=lambda _: hold.wait(30) or None)
    submit(loader, written)
    closer = threading.Thread(target=loader.close)
    closer.start()
    hold.set()
    with pytest.raises(LoadError, match="closed"):
        loader.finish()
        loader.finish()
    closer.join(30)
    assert not closer.is_alive()


@pytest.mark.parametrize("call", ["finish", "close"])
def test_a_call_from_progress(written: Written, call: str) -> None:
    loader = ExpertLoader("cpu", SMALL, progress=lambda _: getattr(loader, call)())
    submit(loader, written)
    with pytest.raises(LoadError, match=r"progress could not be reported.*called from its own progress"):
        loader.finish()
    loader.close()


def test_short_reprs(written: Written) -> None:
    loaded = load_layer(written.root, 1, options=SMALL)
    ready = load_ready(written.root, 1, options=SMALL)
    for value in (written.manifest, written.manifest.layers[0], Catalog.open(written.root), loaded, ready):
        assert len(repr(value)) < 800
