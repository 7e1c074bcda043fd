"""A source's descriptors: few of them, never closed while they are used."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvfp4_prep.checkpoint import descriptor_pool
from nvfp4_prep.checkpoint.descriptor_pool import DescriptorPool


class Files:
    """Files that count how often each was opened."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.opened = folder, [0] * count
        for number in range(count):
            (folder / str(number)).write_text(f"content of {number}")

    def open(self, name: str) -> int:
        self.opened[int(name)] += 1
        return os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, 12)


@pytest.fixture
def pool(files: Files) -> Iterator[DescriptorPool]:
    made = DescriptorPool(files.open, limit=3)
    yield made
    made.close()


def open_now(folder: Path) -> int:
    """How many of a folder's files this process has open."""
    return sum(str(folder) in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())


def test_the_longest_unused_is_closed_first(pool: DescriptorPool, files: Files) -> None:
    for name in ("0", "1", "2", "0", "3", "0", "1"):
        with pool.use(name) as descriptor:
            assert os.pread(descriptor, 100, 0).decode() == f"content of {name}"
        assert open_now(files.folder) <= 3
    assert files.opened[:4] == [1, 2, 1, 1]


def test_one_in_use_stays_open(pool: DescriptorPool, files: Files) -> None:
    with pool.use("0") as descriptor:
        for name in map(str, range(1, 12)):
            with pool.use(name):
                pass
        pool.forget("0")
        assert os.pread(descriptor, 7, 0) == b"content"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_close_gives_all_back(pool: DescriptorPool, files: Files) -> None:
    for name in ("0", "1"):
        with pool.use(name):
            pass
    pool.close()
    assert open_now(files.folder) == 0


def test_threads_read_what_they_asked_for(pool: DescriptorPool) -> None:
    wrong: list[str] = []

    def work(first: int) -> None:
        for step in range(300):
            name = str((first + step * 5) % 12)
            with pool.use(name) as descriptor:
                if os.pread(descriptor, 100, 0).decode() != f"content of {name}":
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_process_with_many_open_files_keeps_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the limit would be more than is left: outputs and libraries need descriptors, too."""
    monkeypatch.setattr(descriptor_pool.resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(descriptor_pool, "_open_now", lambda: 20)
    assert descriptor_pool._default_limit() == 256
    monkeypatch.setattr(descriptor_pool, "_open_now", lambda: 964)
    assert descriptor_pool._default_limit() == 20
