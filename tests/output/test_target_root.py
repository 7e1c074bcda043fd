"""Links and special files in a target: refused, and nothing behind them touched."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from nvfp4_prep import convert, relayout, restore, verify
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.commands.convert import convert as convert_command
from nvfp4_prep.commands.convert_parts import convert_part, join_parts
from nvfp4_prep.errors import TargetError
from nvfp4_prep.output import exclusive_rename as rename_module
from nvfp4_prep.output.journal_file import JournalFile
from nvfp4_prep.output.layer_selection import LayerSelection, discard_parts, list_parts, part_folder
from nvfp4_prep.output.sink import KeepFiles
from nvfp4_prep.output.target import Target
from nvfp4_prep.output.target_checks import check_ours
from nvfp4_prep.output.target_root import TargetRoot

SHA256 = "0" * 64


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_text("x")
    return folder


def is_whole(victim: Path) -> bool:
    return [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "x"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("place", ["", "leftover", "journal.jsonl", "lock", "parts", "source"])
@pytest.mark.parametrize("to_file", [False, True])
def test_link_in_the_work_folder_is_refused(
    tmp_path: Path, victim: Path, place: str, to_file: bool, restart: bool
) -> None:
    link = tmp_path / "out" / WORK_FOLDER / place
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / "file" if to_file else victim)
    with pytest.raises(TargetError, match="is not what nvfp4-prep makes there"):
        Target.open(tmp_path / "out", {"a": 1}, restart=restart)
    assert is_whole(victim)
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["journal.jsonl", "lock", "leftover"])
def test_fifo_in_the_work_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / WORK_FOLDER).mkdir()
    os.mkfifo(tmp_path / WORK_FOLDER / name)
    with pytest.raises(TargetError, match=r"is not what.*found a FIFO\. Remove it"):
        Target.open(tmp_path, {"a": 1})


@pytest.mark.parametrize("name", ["", "journal.jsonl"])
def test_the_advice_on_a_link_in_the_work_folder_helps(sample_source: Path, tmp_path: Path, name: str) -> None:
    """Somebody moved the work to another disk: removed, it would leave files that nobody knows."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    with pytest.raises(InterruptedError):
        convert_command(sample_source, out, sink=_StopAtFirst(), threads=1)
    (out / WORK_FOLDER / name).rename(moved)
    (out / WORK_FOLDER / name).symlink_to(moved)
    with pytest.raises(TargetError, match=r"found a symbolic link\. Put what it leads to in its place"):
        convert(sample_source, out, smoke=None, restart=True)
    (out / WORK_FOLDER / name).unlink()
    moved.rename(out / WORK_FOLDER / name)
    assert convert(sample_source, out, smoke=None).resumed


@pytest.mark.parametrize("command", ["convert", "restore", "relayout"])
def test_commands_refuse_a_work_folder_that_is_a_link(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, victim: Path, command: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / WORK_FOLDER).symlink_to(victim)
    with pytest.raises(TargetError, match="is not what"):
        if command == "convert":
            convert(sample_source, out, restart=True)
        elif command == "restore":
            restore(sample_prepared, out, restart=True)
        else:
            relayout(sample_prepared, out, gate_up_block=16)
    assert is_whole(victim)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_links_on_the_way_to_a_part_are_refused(sample_source: Path, tmp_path: Path, victim: Path, depth: int) -> None:
    """The work folder, the parts folder, the part's folder and its own work folder."""
    out = tmp_path / "out"
    part = part_folder(out, LayerSelection.parse("1/1"))
    link = [part.parent.parent, part.parent, part, part / WORK_FOLDER][depth]
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with pytest.raises(TargetError):
        convert_part(sample_source, out, "1/1")
    with pytest.raises(TargetError):
        join_parts(sample_source, out)
    with pytest.raises(TargetError):
        discard_parts(out, lambda selection: {})
        list_parts(out)
    assert is_whole(victim)


def test_folder_that_becomes_a_link_while_a_run_works(tmp_path: Path, victim: Path) -> None:
    with pytest.raises(TargetError, match="is not what"), Target.open(tmp_path / "out", {"a": 1}) as target:
        file = target.create("sub/file", 1)
        (tmp_path / "out" / "sub").symlink_to(victim)
        file.write(0, b"1")
        file.commit({"sha256": SHA256})
    assert is_whole(victim)


@pytest.mark.parametrize("restart", [False, True])
def test_a_journal_does_not_reach_behind_a_link(tmp_path: Path, victim: Path, restart: bool) -> None:
    with Target.open(tmp_path / "out", {"a": 1}) as target:
        target.note({"file": "d/file", "nbytes": 1, "sha256": SHA256})
    (tmp_path / "out" / "d").symlink_to(victim)
    with pytest.raises(TargetError):
        Target.open(tmp_path / "out", {"a": 1}, restart=restart)
    assert is_whole(victim)


def test_restart_does_not_take_the_work_folder_for_a_file(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", {"a": 1}) as target:
        target.note({"file": f"{WORK_FOLDER}/lock", "nbytes": 0, "sha256": SHA256})
    with Target.open(tmp_path / "out", {"a": 1}, restart=True) as target:
        assert (target.work / "lock").exists()


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../../x", "a//b", ".", "a\\b", "a\0b"])
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    with TargetRoot.open(tmp_path / "out") as root:
        for act in (root.unlink, root.status, root.remove_tree, lambda name: root.open_file(name, os.O_CREAT)):
            with pytest.raises(TargetError, match="unsafe"):
                act(name)
        with pytest.raises(TargetError, match="unsafe"):
            root.move("x", name, replace=True)


@pytest.mark.parametrize("way", ["renameat2", "link", "look"])
def test_rename_never_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way != "renameat2":
        monkeypatch.setattr(rename_module, "_renameat2", lambda *names: errno.EINVAL)
    if way == "look":

        def no_links(*names: object, **options: object) -> None:
            raise OSError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", no_links)
    for name in ("old", "there"):
        (tmp_path / name).write_text(name)
    with TargetRoot.open(tmp_path) as root:
        with pytest.raises(FileExistsError):
            root.move("old", "there", replace=False)
        assert (tmp_path / "there").read_text() == "there"
        root.move("old", "sub/new", replace=False)
        assert (tmp_path / "sub" / "new").read_text() == "old"
        root.move("sub/new", "there", replace=True)
    assert (tmp_path / "there").read_text() == "old"


def test_remove_tree_leaves_what_is_behind_links(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "link").symlink_to(victim)
    with TargetRoot.open(tmp_path) as root:
        root.remove_tree("tree")
        root.remove_tree("tree")
    assert is_whole(victim)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_CREAT])
def test_a_file_with_a_second_name_is_not_written(tmp_path: Path, victim: Path, flags: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.link(victim / "file", out / "file")
    with TargetRoot.open(out) as root:
        with pytest.raises(TargetError, match="2 hard links"):
            root.open_file("file", flags)
        assert root.read("file", 10) == b"x"
    assert is_whole(victim)


@pytest.mark.parametrize("restart", [False, True])
def test_a_journal_with_a_second_name_is_refused(tmp_path: Path, victim: Path, restart: bool) -> None:
    (tmp_path / "out" / WORK_FOLDER).mkdir(parents=True)
    os.link(victim / "file", tmp_path / "out" / WORK_FOLDER / "journal.jsonl")
    with pytest.raises(TargetError, match="hard links"):
        Target.open(tmp_path / "out", {"a": 1}, restart=restart)
    assert is_whole(victim)


def test_new_directories_are_flushed_in_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("nvfp4_prep.output.target_root.sync_folder", flushed.append)
    TargetRoot.open(tmp_path / "a" / "b" / "c", make=True).close()
    assert set(flushed) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    flushed.clear()
    TargetRoot.open(tmp_path / "a" / "b", make=True).close()
    assert not flushed


@pytest.mark.parametrize("name", ["config.json", "nvfp4_prep.json", "README.md"])
def test_restart_removes_only_what_the_journal_names(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    with Target.open(out, {"a": 1}) as target:
        target.write_file("d/ours", b"1")
    (out / name).write_text("mine")
    with Target.open(out, {"a": 1}, restart=True) as target:
        assert not (out / "d" / "ours").exists()
        with pytest.raises(TargetError, match="something else"):
            target.check_names([name, "d/ours"])
    assert (out / name).read_text() == "mine"


def test_the_journal_is_emptied_after_what_it_names_is_gone_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut must not leave files that no journal names."""
    with Target.open(tmp_path, {"a": 1}) as target:
        target.write_file("d/ours", b"1")
        target.write_file("ours", b"1")
    steps: list[str] = []
    real_sync, real_empty = TargetRoot.sync, JournalFile.empty

    def sync(root: TargetRoot, folder: str = "") -> None:
        steps.append(f"sync {folder}")
        real_sync(root, folder)

    def empty(journal: JournalFile) -> None:
        steps.append("empty")
        real_empty(journal)

    monkeypatch.setattr(TargetRoot, "sync", sync)
    monkeypatch.setattr(JournalFile, "empty", empty)
    Target.open(tmp_path, {"a": 1}, restart=True).__exit__(None, None, None)
    assert set(steps[: steps.index("empty")]) == {"sync ", "sync d"}


def test_bytes_changed_in_place_are_noticed_before_the_end(tmp_path: Path) -> None:
    with Target.open(tmp_path / "out", {"a": 1}) as target:
        target.write_file("ours", b"1")
        target.check_files()
        (tmp_path / "out" / "ours").write_bytes(b"2")
        os.utime(tmp_path / "out" / "ours", ns=(1, 1))
        with pytest.raises(TargetError, match="modification time"):
            target.check_files()


def test_a_target_that_is_a_dangling_link_is_refused_when_looked_at(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetError, match="is not a directory"):
        check_ours(tmp_path / "out")


class _StopAtFirst(KeepFiles):
    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        raise InterruptedError


def test_the_advice_on_a_second_name_can_be_followed(sample_source: Path, tmp_path: Path) -> None:
    """``cp -al`` of an unfinished target is somebody's backup; following the advice costs no finished file."""
    out = tmp_path / "an out"
    with pytest.raises(InterruptedError):
        convert_command(sample_source, out, sink=_StopAtFirst(), threads=1)
    subprocess.run(["cp", "-al", out, tmp_path / "backup"], check=True)
    for _ in range(10):
        try:
            assert convert(sample_source, out, smoke=None).resumed
            break
        except TargetError as error:
            assert "hard links" in str(error) and error.next_step is not None
            command = error.next_step.partition("(")[2].partition("), or give")[0]
            subprocess.run(command, shell=True, check=True)
    assert verify(out).ok
    assert (tmp_path / "backup" / ".nvfp4_prep" / "journal.jsonl").is_file()
