"""What is in the page cache is known without reading it, and whole rows stay in it for the other ranks."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_prep.load import Catalog, DirectIO, page_cache
from nvfp4_prep.load.open_files import OpenFiles
from nvfp4_prep.load.page_cache import cached_pages, cached_share, forget
from nvfp4_prep.load.read_plan import ALIGNMENT, Segment
from nvfp4_prep.load.reader import FileReader, ReadCounts
from nvfp4_prep.load.storage import storage_of
from nvfp4_prep_kernels import MoeDims
from support.load_files import Written, write_checkpoint

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16 * MIB))
    if storage_of(tmp_path).startswith(("tmpfs", "ramfs")):
        pytest.skip("files in memory are always cached")
    return path


def test_a_file_that_was_forgotten_and_read(file: Path) -> None:
    assert cached_share([file]) > 0.9
    forget([file])
    assert cached_share([file]) < 0.1
    assert cached_share([file]) < 0.1, "asking has brought it in"
    file.read_bytes()
    assert cached_share([file, file]) > 0.9


def test_the_part_that_was_read(file: Path) -> None:
    forget([file])
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.pread(descriptor, ALIGNMENT, 8 * MIB)
        assert cached_pages(descriptor, [8 * MIB]) == 1
        assert cached_pages(descriptor, [8 * MIB + 5, 2 * MIB, 12 * MIB]) == 1
    finally:
        os.close(descriptor)


def answer(error: int | None) -> Any:
    def preadv(_descriptor: int, buffers: Sequence[bytearray], _offset: int, _flags: int) -> int:
        if error is not None:
            raise OSError(error, os.strerror(error))
        return len(buffers[0])

    return preadv


@pytest.mark.parametrize(
    ("error", "cached"), [(None, 3), (errno.EAGAIN, 0), (errno.EOPNOTSUPP, 3), (errno.EIO, 3)], ids=str
)
def test_where_every_page_is_called_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None, cached: int
) -> None:
    """As ``mincore`` does for users who may not write the file; then reads that must not wait decide."""
    (tmp_path / "file").write_bytes(bytes(MIB))
    monkeypatch.setattr(page_cache, "_in_core", lambda _descriptor, offsets: len(offsets))
    monkeypatch.setattr(page_cache.os, "preadv", answer(error))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    assert cached_pages(descriptor, [0, 4096, 8192]) == cached
    os.close(descriptor)


def test_a_file_system_that_knows_no_reads_without_waiting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FUSE: what was forgotten must not be taken for cached."""
    monkeypatch.setattr(page_cache.os, "preadv", answer(errno.EOPNOTSUPP))
    forget([file])
    assert cached_share([file]) < 0.1
    file.read_bytes()
    assert cached_share([file]) == 1.0


def test_pages_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert cached_share([tmp_path / "empty"]) == 1.0


@pytest.mark.parametrize(("share_rows", "runs", "direct"), [(False, 512, True), (True, 512, False), (True, 1, True)])
def test_rows_that_others_need_go_through_the_page_cache(file: Path, share_rows: bool, runs: int, direct: bool) -> None:
    reader = FileReader.open(file, direct=True)
    if not reader.direct:
        pytest.skip("no direct I/O here")
    reader.share_rows = share_rows
    size = 2 * MIB
    segment = Segment(4096, 1024 if runs > 1 else size, 4096 if runs > 1 else size, runs)
    buffer = torch.empty(4 * MIB, dtype=torch.uint8)
    target = buffer[-buffer.data_ptr() % ALIGNMENT :]
    counts = ReadCounts()
    lead = reader.read_span("w2", segment, target, counts)
    reader.close()
    assert (counts.direct_nbytes > 0) is direct
    expected = file.read_bytes()[4096 : 4096 + segment.span_nbytes]
    assert target[lead : lead + segment.span_nbytes].numpy().tobytes() == expected


@pytest.mark.parametrize(("mode", "shared"), [(DirectIO.AUTO, True), (DirectIO.ALWAYS, False)])
def test_only_the_automatic_choice_shares_rows(tmp_path: Path, mode: DirectIO, shared: bool) -> None:
    written: Written = write_checkpoint(tmp_path, MoeDims(2, 256, 256))
    record = Catalog.open(tmp_path).records(written.manifest.layers[0])["w2_weight"]
    files = OpenFiles(mode)
    assert files.reader(written.file(1), record, (0, 1)).share_rows is shared
    files.close()
