"""Threads and staging near the GPU, with a machine's sysfs written out."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvfp4_prep.load import Catalog, ExpertLoader, LoadOptions, loader, reader
from nvfp4_prep.load.numa import near_processors, run_near, stay_near
from nvfp4_prep_kernels import MoeDims, PreparedTensor, rank_slice
from support.load_files import write_checkpoint

GPU = torch.device("cuda", 1)
NEAR = {*range(8, 16), *range(24, 32)}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes with 16 of 32 processors each, two GPUs at each."""
    for node, cpulist in enumerate(("0-7,16-23", "8-15,24-31")):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(f"{cpulist}\n")
    for gpu, node in enumerate((0, 1, 0, 1)):
        folder = tmp_path / f"bus/pci/devices/0001:{0xA0 + gpu:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(32)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(pci_domain_id=1, pci_bus_id=0xA0 + number, pci_device_id=0),
    )
    return tmp_path


def test_the_processors_of_the_gpus_node(machine: Path) -> None:
    assert near_processors(GPU, 8, machine) == NEAR
    assert near_processors(torch.device("cuda", 2), 8, machine) == set(range(32)) - NEAR


def test_too_few_for_the_ranks_of_this_node(machine: Path) -> None:
    assert near_processors(GPU, 9, machine) is None  # two GPUs are attached to it


def test_within_what_the_process_may_use(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 2, 8, 9, 10, 11})
    assert near_processors(GPU, 2, machine) == {8, 9, 10, 11}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {8, 9, 10, 11})
    assert near_processors(GPU, 2, machine) is None  # bound already


@pytest.mark.parametrize("text", ["-1\n", "what?\n", None])
def test_an_unknown_node(machine: Path, text: str | None) -> None:
    file = machine / "bus/pci/devices/0001:a1:00.0/numa_node"
    file.unlink() if text is None else file.write_text(text)
    assert near_processors(GPU, 1, machine) is None


def test_a_torch_that_does_not_say(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _number: SimpleNamespace(name="GPU"))
    assert near_processors(GPU, 1, machine) is None


def test_an_unreadable_list_of_processors(machine: Path) -> None:
    (machine / "devices/system/node/node1/cpulist").write_text("8-x\n")
    assert near_processors(GPU, 1, machine) is None


def test_host_memory_has_no_gpu() -> None:
    assert near_processors(torch.device("cpu"), 1) is None


def test_only_the_reading_threads_are_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.sched_getaffinity(0)
    near = frozenset({min(own)})
    monkeypatch.setattr(loader, "near_processors", lambda *_args: near)
    where: dict[str, set[int]] = {}
    preadv, make = os.preadv, loader.make_buffers

    def read(*args: Any) -> int:
        where[threading.current_thread().name] = os.sched_getaffinity(0)
        return preadv(*args)

    def make_buffers(*args: Any, **kwargs: Any) -> Any:
        where["staging"] = os.sched_getaffinity(0)
        return make(*args, **kwargs)

    monkeypatch.setattr(reader.os, "preadv", read)
    monkeypatch.setattr(loader, "make_buffers", make_buffers)
    dims = MoeDims(2, 256, 256)
    written = write_checkpoint(tmp_path, dims)
    record = written.manifest.layers[0]
    part = rank_slice(written.layout, PreparedTensor.W2_WEIGHT, dims, 0, 1)
    target = torch.empty((2, *part.shape), dtype=torch.uint8)
    with ExpertLoader("cpu", LoadOptions(threads=1, direct_io="never")) as loading:  # type: ignore[arg-type]
        tensor = Catalog.open(tmp_path).records(record)["w2_weight"]
        loading.submit(written.file(1), tensor, part, (0, 1), target)
        loading.finish()
    where.pop(threading.current_thread().name, None)  # opening a file probes it from the caller's thread
    assert where == {"staging": near, "nvfp4-load-read-0": near}
    assert os.sched_getaffinity(0) == own
    assert torch.equal(target, written.tensors[1]["w2_weight"])


def test_processors_that_the_system_refuses() -> None:
    own = os.sched_getaffinity(0)
    assert run_near(frozenset({100_000}), lambda: os.sched_getaffinity(0)) == own
    stay_near(None)
    assert os.sched_getaffinity(0) == own
