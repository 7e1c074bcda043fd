"""The output directory: journal, resume, names."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep._util.buffers import byte_view, empty_bytes
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import NoSpaceError, ResumeConflictError, TargetError
from nvfp4_prep.output import target_root
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.outline import Outline
from nvfp4_prep.output.target import Target
from nvfp4_prep.output.target_checks import PARTS_FOLDER, SOURCE_FOLDER, check_names, has_journal
from nvfp4_prep.output.target_root import TargetRoot

SHA256 = "0" * 64
IDENTITY = {"options": {"a": 1}, "files": {"x": [1, "t"]}}


def write(target: Target, name: str, data: bytes) -> None:
    file = target.create(name, len(data))
    file.write(0, data)
    file.commit({"sha256": SHA256})


def test_journal_remembers_finished_files(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", IDENTITY) as target:
        assert not target.resumed
        write(target, "a", b"123")
        write(target, "sub/b", b"4")
    with Target.open(tmp_path / "out", IDENTITY) as target:
        assert target.resumed
        assert set(target.done) == {"a", "sub/b"}
        target.finish()
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["a", "b", "sub"]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_journal_cut_off_in_its_last_line(tmp_path: Path, cut: int) -> None:
    with Target.open(tmp_path / "out", IDENTITY) as target:
        write(target, "a", b"123")
        write(target, "b", b"45")
    journal = tmp_path / "out" / WORK_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    (tmp_path / "out" / "b").unlink()  # a file gets its name only once the journal's line is on disk
    with Target.open(tmp_path / "out", IDENTITY) as target:
        assert "a" in target.done
        assert "b" not in target.done or cut == 0
        write(target, "b", b"45")
    with Target.open(tmp_path / "out", IDENTITY) as target:
        assert set(target.done) == {"a", "b"}


def test_differences_are_named_with_both_values(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", IDENTITY):
        pass
    changed = {"options": {"a": 2}, "files": {"x": [1, "t"], "y": [2, "u"]}}
    with pytest.raises(ResumeConflictError) as caught:
        Target.open(tmp_path / "out", changed)
    assert "options.a was 1, now 2" in str(caught.value)
    assert 'files.y was null, now [2, "u"]' in str(caught.value)
    assert "--restart" in str(caught.value)


def test_restart_deletes_only_what_the_earlier_run_wrote(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", IDENTITY) as target:
        write(target, "a", b"123")
    (tmp_path / "out" / "mine").write_text("keep")
    with Target.open(tmp_path / "out", {"other": 1}, restart=True) as target:
        assert target.done == {}
        with pytest.raises(TargetError, match="mine"):
            target.check_names(["a"])
    assert not (tmp_path / "out" / "a").exists()
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def fail(target: Target) -> None:
    with target:
        raise NoSpaceError("not enough space")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("late", [False, True], ids=["before the look", "after the look"])
@pytest.mark.parametrize("theirs", [b"same", b"longer"])
def test_file_that_was_in_the_way_is_never_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: bytes, late: bool, restart: bool
) -> None:
    """The run that met it ends, and the next one neither takes it for finished nor replaces or deletes it."""
    out = tmp_path / "out"
    move = TargetRoot.move

    def overtaken(self: TargetRoot, old: str, new: str, **options: Any) -> None:
        (out / "b").write_bytes(theirs)
        move(self, old, new, **options)

    with Target.open(out, IDENTITY) as target:
        write(target, "a", b"123")
        if late:
            monkeypatch.setattr(TargetRoot, "move", overtaken)
        else:
            (out / "b").write_bytes(theirs)
        with pytest.raises(TargetError, match="would replace a file that another program put there"):
            write(target, "b", b"ours")
    monkeypatch.undo()
    with Target.open(out, IDENTITY, restart=restart) as target:
        assert "b" not in target.done
        with pytest.raises(TargetError, match="something else"):
            target.check_names(["a", "b"])
        with pytest.raises(TargetError, match="would replace"):
            write(target, "b", b"ours")
    assert (out / "b").read_bytes() == theirs
    (out / "b").unlink()
    with Target.open(out, IDENTITY) as target:
        write(target, "b", b"ours")
        assert "b" in target.done


@pytest.mark.parametrize("name", ["n" * 256, "folder", "link", "fifo"])
def test_restart_goes_on_where_the_journal_names_what_is_no_file_of_ours(tmp_path: Path, name: str) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    with Target.open(out, IDENTITY) as target:
        write(target, "a", b"123")
        target.note({"made": name})
    mine.touch()
    (out / "folder").mkdir()
    (out / "link").symlink_to(mine)
    os.mkfifo(out / "fifo")
    for restart in (False, True):
        with Target.open(out, IDENTITY, restart=restart) as target:
            assert target.resumed != restart
    assert sorted(path.name for path in out.iterdir()) == [WORK_FOLDER, "fifo", "folder", "link"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EACCES, "holds a file of something else"), (errno.EIO, "Input/output error")]
)
def test_file_that_cannot_be_looked_into_is_refused_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    out, opened = tmp_path / "out", TargetRoot.open_file

    def refuse(self: TargetRoot, name: str, *rest: Any, **options: Any) -> int:
        if name == "a":
            raise OSError(number, os.strerror(number))
        return opened(self, name, *rest, **options)

    with Target.open(out, IDENTITY) as target:
        (out / "a").write_bytes(b"123")
        monkeypatch.setattr(TargetRoot, "open_file", refuse)
        with pytest.raises(TargetError, match=f"{out / 'a'}: .*{message}"):
            target.check_names(["a"], {"a": Outline(3)})


def test_run_that_wrote_no_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "there"):
        with pytest.raises(NoSpaceError):
            fail(Target.open(out, IDENTITY))
        with pytest.raises(RuntimeError, match="in the middle"), Target.open(out, IDENTITY) as target:
            target.create("sub/x", 3)
            raise RuntimeError("in the middle")
        with Target.open(out, {"another": "job"}) as target:
            assert not target.resumed
            target.finish()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "there"]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(NoSpaceError):
        fail(Target.open(tmp_path / "a" / "b", IDENTITY))
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_failed_run_leaves_what_it_and_others_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), Target.open(out, IDENTITY) as target:
        write(target, "a", b"123")
        raise RuntimeError
    with pytest.raises(NoSpaceError):
        fail(Target.open(out, IDENTITY))
    with Target.open(out, IDENTITY) as target:
        assert target.resumed
        assert set(target.done) == {"a"}
    with pytest.raises(NoSpaceError):
        fail(Target.open(out, {"another": "job"}, restart=True))
    assert list(out.iterdir()) == []
    for folder in (PARTS_FOLDER, SOURCE_FOLDER):  # a part that waits for the join, a download that goes on
        (out / WORK_FOLDER / folder).mkdir(parents=True)
        with pytest.raises(NoSpaceError):
            fail(Target.open(out, IDENTITY))
        assert has_journal(out)
        shutil.rmtree(out / WORK_FOLDER)


def test_journal_that_points_outside_is_not_followed(tmp_path: Path) -> None:
    """A forged journal must not make --restart delete files elsewhere."""
    (tmp_path / "precious").write_text("x")
    with Target.open(tmp_path / "out", IDENTITY):
        pass
    journal = tmp_path / "out" / WORK_FOLDER / "journal.jsonl"
    forged = journal.read_text() + json.dumps({"file": "../precious", "nbytes": 1}) + "\n"
    journal.write_text(forged)
    with Target.open(tmp_path / "out", IDENTITY, restart=True) as target:
        assert target.done == {}
    assert (tmp_path / "precious").exists()


def test_damaged_journal_head(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", IDENTITY) as target:
        write(target, "a", b"1")
    (tmp_path / "out" / WORK_FOLDER / "journal.jsonl").write_bytes(b"\x00garbage\n[1]\n")
    with Target.open(tmp_path / "out", IDENTITY) as target:
        assert target.done == {}


def test_direct_and_buffered_writes_give_one_file(tmp_path: Path) -> None:
    """Large aligned pieces, unaligned ones and tails in one file, on whatever file system the tests run on."""
    pieces = [(0, 3 * 2**20), (3 * 2**20, 2**20 + 77), (4 * 2**20 + 77, 2**21), (6 * 2**20 + 77, 5)]
    with Target.open(tmp_path / "out", IDENTITY) as target:
        file = target.create("a", sum(nbytes for _, nbytes in pieces))
        whole = b""
        for offset, nbytes in pieces:
            data = empty_bytes(nbytes).random_()
            file.write(offset, byte_view(data))
            whole += bytes(byte_view(data))
        file.commit({"sha256": SHA256})
    assert (tmp_path / "out" / "a").read_bytes() == whole


def test_file_system_that_refuses_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def picky(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", picky)
    data = empty_bytes(2**21).random_()
    with Target.open(tmp_path / "out", IDENTITY) as target:
        file = target.create("a", 2**21)
        file.write(0, byte_view(data))
        file.commit({"sha256": SHA256})
    assert (tmp_path / "out" / "a").read_bytes() == bytes(byte_view(data))


def test_killed_while_it_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is gone, the rest of the work folder is still there: the output is finished and nobody's to write."""
    with Target.open(tmp_path / "out", IDENTITY) as target:
        write(target, "config.json", b"{}")

        def killed(self: TargetRoot, name: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(TargetRoot, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            target.finish()
    assert (tmp_path / "out" / WORK_FOLDER).is_dir()
    for restart in (False, True):
        with pytest.raises(TargetError, match="not empty"):
            Target.open(tmp_path / "out", {"another": "job"}, restart=restart)
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"


def test_restart_takes_away_what_makes_a_directory_a_checkpoint(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", IDENTITY) as target:
        write(target, "a", b"123")
        target.write_file("nvfp4_prep.json", b"{}")
        target.write_file("config.json", b"{}")
    with Target.open(tmp_path / "out", {"another": "job"}, restart=True):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK_FOLDER]


def test_work_folder_of_a_download_does_not_open_a_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "out" / WORK_FOLDER / "source").mkdir(parents=True)
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(TargetError, match="not empty"):
        Target.open(tmp_path / "out", IDENTITY)


def test_failed_commit_does_not_close_somebody_elses_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Target.open(tmp_path / "out", IDENTITY) as target:
        file = target.create("a", 1)

        def full(entry: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(target, "note", full)
        with pytest.raises(NoSpaceError):
            file.commit({"sha256": SHA256})
        others = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]  # take the numbers that were closed
        file.abandon()
        for descriptor in others:
            os.close(descriptor)
    assert not list((tmp_path / "out" / WORK_FOLDER).rglob("a*"))


def test_restart_killed_before_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index and card are in no journal: what is left of a restart must still be ours."""
    with Target.open(tmp_path / "out", IDENTITY) as target:
        write(target, "a", b"123")
        target.write_file("README.md", b"card")

    def killed(target: Target, entry: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Target, "note", killed)
        with pytest.raises(KeyboardInterrupt):
            Target.open(tmp_path / "out", {"another": "job"}, restart=True)
    with Target.open(tmp_path / "out", {"another": "job"}) as target:
        target.check_names(["README.md"])
        assert target.done == {}


def test_journal_is_on_disk_before_the_first_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without a journal would be somebody else's after a power cut."""
    happened: list[tuple[str, str]] = []
    fsync, rename = os.fsync, target_root.rename_new

    def noted_fsync(descriptor: int) -> None:
        happened.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def noted_rename(old: str, new: str, old_folder: int, new_folder: int) -> None:
        happened.append(("rename", str(Path(f"/proc/self/fd/{new_folder}").readlink() / new)))
        rename(old, new, old_folder, new_folder)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(target_root, "rename_new", noted_rename)
    out = tmp_path / "out"
    with Target.open(out, IDENTITY) as target:
        write(target, "sub/deep/a", b"123")
    renamed = happened.index(("rename", str(out / "sub/deep/a")))
    assert {("fsync", str(out / WORK_FOLDER)), ("fsync", str(out))} <= set(happened[:renamed])
    assert {("fsync", str(out / "sub")), ("fsync", str(out))} <= set(happened[:renamed])  # folders made for it
    assert ("fsync", str(out / "sub/deep")) in happened[renamed:]


def test_files_in_work_meet_neither_parts_nor_downloads(tmp_path: Path) -> None:
    """A source may have a folder of any name."""
    with Target.open(tmp_path / "out", IDENTITY) as target:
        for name in ("parts/a/x", "source/x", "lock", "journal.jsonl"):
            write(target, name, b"1")
        assert not (target.work / PARTS_FOLDER).exists()
        assert not (target.work / SOURCE_FOLDER).exists()
    with Target.open(tmp_path / "out", IDENTITY) as target:
        assert len(target.done) == 4


def test_longest_name_that_a_file_system_takes(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", IDENTITY) as target:
        write(target, "n" * 255, b"1")


@pytest.mark.parametrize("kind", ["file", "fifo", "socket", "link", "dangling", "link to a folder"])
def test_nothing_else_may_stand_in_a_target(tmp_path: Path, kind: str) -> None:
    """Whatever it is: the checkpoint that a run ends with is looked at as a whole."""
    out, strange = tmp_path / "out", tmp_path / "out" / "folder" / "strange"
    strange.parent.mkdir(parents=True)
    (out / "known").touch()
    check_names(out, {"known"})
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "fifo":
            os.mkfifo(strange)
        elif kind == "socket":
            listener.bind(str(strange))
        elif kind == "file":
            strange.touch()
        else:
            strange.symlink_to({"link": "../known", "dangling": "nowhere"}.get(kind, str(tmp_path)))
        with pytest.raises(TargetError, match=f"{strange}: holds a file of something else"):
            check_names(out, {"known"})
        if kind != "file":
            with pytest.raises(TargetError, match="something else"):
                check_names(out, {"known", "folder/strange"})


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EFBIG, r"ulimit -f"), (errno.EACCES, "Check the directory's permissions")]
)
def test_a_limit_of_file_sizes_is_not_taken_for_a_permission(tmp_path: Path, number: int, advice: str) -> None:
    error = translate_os_error(OSError(number, os.strerror(number)), tmp_path / "x")
    assert isinstance(error, TargetError)
    assert advice in str(error)
