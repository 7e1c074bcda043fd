"""The local directory as source: links, hub snapshots, ranges; and that nothing in it is ever changed."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nvfp4_prep import convert
from nvfp4_prep.checkpoint.local_files import MAX_FOLDER_DEPTH
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.errors import OpenFilesError, ResumeConflictError, SourceError
from nvfp4_prep.output.sink import KeepFiles
from nvfp4_prep.planning.builder import make_plan
from support.tiny_checkpoints import TinyLayer, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "source", TinyLayer().tensors())


def test_missing_directory_and_file_as_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        LocalSource(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="is not a directory"):
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


def test_name_that_is_not_utf8(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with pytest.raises(SourceError, match=r"udce9\.txt.*valid UTF-8") as caught:
        LocalSource(folder)
    str(caught.value).encode()  # the error itself can be printed


def test_path_that_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    folder.rename(place)
    assert LocalSource(place).label == "caf\\xe9"


def test_path_with_nul() -> None:
    with pytest.raises(SourceError, match="NUL"):
        LocalSource(Path("a\0b"))


@pytest.mark.parametrize("name", ["new\nline", "esc\x1b[2J", "\u202eeman", "x" * 255])
def test_odd_but_valid_names_are_kept(folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    source = LocalSource(folder)
    assert source.peek(name, 0, 1) == b"x"
    source.close()


@pytest.mark.parametrize("levels", [MAX_FOLDER_DEPTH, MAX_FOLDER_DEPTH + 1, 1500])
@pytest.mark.slow
def test_nested_folders(folder: Path, levels: int) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    try:
        if levels <= MAX_FOLDER_DEPTH:
            LocalSource(folder).close()
        else:
            with pytest.raises(SourceError, match=rf"nested too deep; expected at most {MAX_FOLDER_DEPTH} levels"):
                LocalSource(folder)
    finally:
        _flatten(folder / "d")


def _flatten(top: Path) -> None:
    """Removes folders that are too deep for a path, and for a recursion."""
    while top.exists():
        inner = top / "d"
        if inner.exists():
            inner.rename(top.parent / "e")
        top.rmdir()
        if (top.parent / "e").exists():
            (top.parent / "e").rename(top)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link(path: Path) -> None:
    copy = path.with_name("copy-of-" + path.name)
    status = copy.stat()
    path.symlink_to(copy.name)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("swap", [_fifo, _socket, _zero, _link, Path.mkdir])
@pytest.mark.parametrize("read", ["peek", "header"])
def test_what_takes_the_place_of_a_listed_file_is_not_read(
    folder: Path, swap: Callable[[Path], None], read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing waits for it: a FIFO would do so for ever."""
    victim = folder / "model.safetensors"
    shutil.copy2(victim, folder / "copy-of-model.safetensors")
    source = LocalSource(folder)
    victim.unlink()
    monkeypatch.chdir(folder)
    swap(victim)
    with pytest.raises(SourceError, match=r"model\.safetensors: (cannot be opened|changed)"):
        source.peek(victim.name, 0, 8) if read == "peek" else source.header(victim.name)
    source.close()


def _rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)


def keeping_times(change: Callable[[Path], None], path: Path) -> None:
    """Changes a file and sets its modification time back."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("change", [_rewrite, _replace])
def test_change_that_keeps_size_and_modification_time(folder: Path, change: Callable[[Path], None]) -> None:
    source = LocalSource(folder)
    victim = folder / "model.safetensors"
    keeping_times(change, victim)
    with pytest.raises(SourceError, match=r"model\.safetensors: changed while"):
        source.check_unchanged()
    with pytest.raises(SourceError, match=r"model\.safetensors: changed while"):
        source.peek("model.safetensors", 0, 8)
    source.close()


class _ChangeAtFirst(KeepFiles):
    """Changes a source after the first file of the output, and stops there if told so."""

    def __init__(self, victim: Path, *, stop: bool) -> None:
        self.victim, self.stop, self.done = victim, stop, False

    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        if not self.done:
            self.done = True
            keeping_times(_rewrite, self.victim)
            if self.stop:
                raise KeyboardInterrupt


def test_conversion_of_a_source_that_changes_meanwhile(folder: Path, tmp_path: Path) -> None:
    sink = _ChangeAtFirst(folder / "model.safetensors", stop=False)
    with pytest.raises(SourceError, match="changed while"):
        convert(folder, tmp_path / "out", sink=sink, threads=1)
    assert not (tmp_path / "out" / "config.json").exists()


def test_resume_with_a_source_that_changed_meanwhile(folder: Path, tmp_path: Path) -> None:
    sink = _ChangeAtFirst(folder / "model.safetensors", stop=True)
    with pytest.raises(BaseException):  # noqa: B017 - the interrupt in whatever form
        convert(folder, tmp_path / "out", sink=sink, threads=1)
    with pytest.raises(ResumeConflictError, match="source's files changed since then"):
        convert(folder, tmp_path / "out")
    assert convert(folder, tmp_path / "out", restart=True).manifest.layers


def test_stored_identity_holds_nothing_of_the_machine(folder: Path) -> None:
    """Parts are made by machines that see one file system under different device numbers."""
    status = (folder / "config.json").stat()
    file = LocalSource(folder).files()[0]
    assert file.identity == f"mtime_ns={status.st_mtime_ns} ctime_ns={status.st_ctime_ns}"
    moved = folder.rename(folder.with_name("moved"))
    assert LocalSource(moved).files()[0] == file


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """As ``ulimit -n`` makes it: room for a few files beside those that the test process has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(link.name) for link in Path("/proc/self/fd").iterdir()) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_shards_than_descriptors(tmp_path: Path, few_descriptors: int) -> None:
    tensors = TinyLayer(experts=40).tensors()
    folder = write(tmp_path / "many", tensors, shards=few_descriptors + 60)
    assert len(make_plan(LocalSource(folder)).index.headers) == few_descriptors + 60
    result = convert(folder, tmp_path / "out", threads=2)
    assert result.manifest.layers[0].dims.experts == 40


def test_no_descriptor_left_is_called_so(folder: Path, few_descriptors: int) -> None:
    source = LocalSource(folder)
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        message = rf"^{folder}/config\.json: .*limit of {few_descriptors} open files.*ulimit -n"
        with pytest.raises(OpenFilesError, match=message) as caught:
            source.peek("config.json", 0, 1)
    finally:
        for descriptor in taken:
            os.close(descriptor)
    assert "permissions" not in str(caught.value)
    assert caught.value.where == str(folder / "config.json")
    assert source.peek("config.json", 0, 1) == b"{"
    source.close()


def test_errors_name_the_whole_path(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"12345678")
    source = LocalSource(folder)
    with pytest.raises(SourceError) as caught:
        source.header("model.safetensors")
    assert str(caught.value).startswith(f"{folder}/model.safetensors: ")
    source.close()


@pytest.mark.parametrize("given", [".", "../source", "sub/.."])
def test_errors_of_a_relative_directory_are_no_bare_file_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder)
    source = LocalSource(Path(given))
    assert source.where("config.json") in (str(folder / "config.json"), "../source/config.json")
    source.close()
