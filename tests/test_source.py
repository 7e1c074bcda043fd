"""The local directory as source: links, hub snapshots, ranges; and that nothing in it is ever changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvfp4_prep.errors import SourceError
from nvfp4_prep.source import LocalSource
from tiny_checkpoints import TinyLayer, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "source", TinyLayer().tensors())


def test_missing_directory_and_file_as_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        LocalSource(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="is no directory"):
        LocalSource(tmp_path / "file")


def test_files_are_sorted_and_hidden_ones_left_out(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("12345")
    files = {file.name: file.nbytes for file in LocalSource(folder).files()}
    assert list(files) == ["config.json", "model.safetensors", "sub/a.txt"]
    assert files["sub/a.txt"] == 5


def test_identity_changes_with_the_file(folder: Path) -> None:
    before = LocalSource(folder).files()
    path = folder / "config.json"
    path.write_text(path.read_text() + " ")
    os.utime(path, ns=(1, 1))
    after = LocalSource(folder).files()
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_link_that_leaves_the_source(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "link.json").symlink_to(secret)
    with pytest.raises(SourceError, match="symbolic link leaves the source") as caught:
        LocalSource(folder)
    assert str(secret) in str(caught.value)


def test_link_chain_that_leaves_the_source(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("")
    (folder / "b").symlink_to(tmp_path / "outside")
    (folder / "a").symlink_to(folder / "b")
    with pytest.raises(SourceError, match="leaves the source"):
        LocalSource(folder)


def test_link_into_a_sibling_with_the_same_prefix(folder: Path, tmp_path: Path) -> None:
    sibling = tmp_path / "source-2"
    sibling.mkdir()
    (sibling / "x").write_text("")
    (folder / "x").symlink_to(sibling / "x")
    with pytest.raises(SourceError, match="leaves the source"):
        LocalSource(folder)


def test_linked_directory_broken_link_and_fifo(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "dir").symlink_to(folder / "real")
    with pytest.raises(SourceError, match="link to a directory"):
        LocalSource(folder)
    (folder / "dir").unlink()
    (folder / "broken").symlink_to(folder / "nothing")
    with pytest.raises(SourceError, match="does not exist"):
        LocalSource(folder)
    (folder / "broken").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(SourceError, match="neither a file nor a directory"):
        LocalSource(folder)


def test_loop_of_links(folder: Path, tmp_path: Path) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match="symbolic link to a file that does not exist"):
        LocalSource(folder)
    with pytest.raises(SourceError, match="does not exist"):
        LocalSource(folder / "loop")


def test_link_inside_the_source_is_followed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "data.bin")
    (folder / "model.safetensors").symlink_to("data.bin")
    source = LocalSource(folder)
    assert source.header("model.safetensors").tensors
    source.close()


def test_hub_snapshot(tmp_path: Path) -> None:
    """The Hub's cache: links to ../../blobs are allowed, name and revision come from the path."""
    cache = tmp_path / "models--nvidia--Tiny-NVFP4"
    made = write(tmp_path / "made", TinyLayer().tensors())
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    source = LocalSource(snapshot)
    assert (source.label, source.revision) == ("nvidia/Tiny-NVFP4", "abc123")
    assert source.header("model.safetensors").tensors
    source.close()
    (tmp_path / "out").write_text("")
    (snapshot / "evil").symlink_to(tmp_path / "out")
    with pytest.raises(SourceError, match="leaves the source"):
        LocalSource(snapshot)


def test_reads_ranges_and_reopens_after_release(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    source = LocalSource(folder)
    source.schedule(["model.safetensors"])
    assert source.peek("model.safetensors", 10, 20) == data[10:30]
    source.release("model.safetensors")
    buffer = bytearray(5)
    source.read_into("model.safetensors", len(data) - 5, memoryview(buffer))
    assert bytes(buffer) == data[-5:]
    source.close()


def test_range_beyond_the_end(folder: Path) -> None:
    size = (folder / "config.json").stat().st_size
    source = LocalSource(folder)
    with pytest.raises(SourceError, match="ended while it was read"):
        source.peek("config.json", size - 1, 2)
    source.close()


def test_file_that_vanished(folder: Path) -> None:
    source = LocalSource(folder)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match="cannot be opened"):
        source.peek("config.json", 0, 1)
    source.close()


@pytest.mark.parametrize("what", ["content", "size", "gone"])
def test_file_that_changed_since_it_was_listed(folder: Path, what: str) -> None:
    source = LocalSource(folder)
    source.check_unchanged()
    victim = folder / "model.safetensors"
    if what == "content":
        status = victim.stat()
        os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif what == "size":
        victim.write_bytes(b"short")
    else:
        victim.unlink()
    with pytest.raises(SourceError, match=r"model.safetensors: (changed while|has gone)"):
        source.check_unchanged()


def test_name_that_no_manifest_can_hold(folder: Path) -> None:
    (folder / "a\\b.txt").write_text("x")
    with pytest.raises(SourceError, match="Rename the file"):
        LocalSource(folder)
