"""A run that continues knows the files that it finished, and notices those that somebody changed in between."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nvfp4_prep import ConvertOptions, convert, convert_part, join_parts
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import TargetError
from nvfp4_prep.output import target as target_module
from nvfp4_prep.output.journal_line import read_line, to_line
from nvfp4_prep.output.layer_selection import LayerSelection, part_folder
from nvfp4_prep.output.noted_files import FileState, judge_files
from nvfp4_prep.output.target import Target
from nvfp4_prep.output.target_root import TargetRoot
from support.checkpoint_files import file_digests
from support.relayout_cases import flip
from support.stopped_runs import EXPERTS, FILE_OF, run_of, stop

OURS, THEIRS = b"ours", b"mine"
LATER = 10**18
IDENTITY = {"what": "test"}
Change = Callable[[Path], None]


def line_of(data: bytes, mtime_ns: int | None, *, sha256: bool = True) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest() if sha256 else None
    entry = {"file": "a", "nbytes": len(data), "sha256": digest}
    return entry if mtime_ns is None else {**entry, "mtime_ns": mtime_ns}


def made_line_of(data: bytes, mtime_ns: int) -> dict[str, Any]:
    line = line_of(data, mtime_ns)
    return {"made": line.pop("file"), **line}


def state_of(folder: Path, lines: list[dict[str, Any]], **options: Any) -> FileState:
    with TargetRoot.open(folder) as root:
        [file] = judge_files(root, lines, **options)
    return file.state


@pytest.mark.parametrize(
    ("data", "mtime_ns", "lines", "state"),
    [
        (OURS, 5, [line_of(OURS, 5)], FileState.FINISHED),
        (THEIRS, 5, [line_of(OURS, 5)], FileState.FINISHED),  # believed, as long as nothing shows the change
        (OURS, 6, [line_of(OURS, 5)], FileState.FINISHED),  # copied without its times
        (THEIRS, 6, [line_of(OURS, 5)], FileState.CHANGED),
        (b"longer", 6, [line_of(OURS, 5)], FileState.CHANGED),
        (b"cut", 5, [line_of(OURS, 5)], FileState.UNFINISHED),
        (OURS, 6, [line_of(OURS, 5, sha256=False)], FileState.TOUCHED),
        (OURS, 6, [made_line_of(OURS, 5)], FileState.UNFINISHED),
        (THEIRS, 6, [made_line_of(OURS, 5)], FileState.CHANGED),
        (b"longer", 6, [made_line_of(OURS, 5)], FileState.CHANGED),
        (OURS, 5, [made_line_of(OURS, 5)], FileState.UNFINISHED),
        (OURS, 6, [{"made": "a", "mtime_ns": 5}], FileState.TOUCHED),
        (OURS, 5, [{"made": "a", "mtime_ns": 5}], FileState.UNFINISHED),
        # the journals of earlier releases
        (THEIRS, 6, [line_of(OURS, None)], FileState.FINISHED),
        (b"longer", 6, [line_of(OURS, None)], FileState.UNFINISHED),
        (OURS, 6, [{"made": "a"}], FileState.UNFINISHED),
        # a kill between the second line and its renaming leaves what the first one noted
        (b"cut", 5, [line_of(OURS, 5), line_of(OURS, 8)], FileState.UNFINISHED),
        (OURS, 8, [line_of(THEIRS, 5), line_of(OURS, 8)], FileState.FINISHED),
        (THEIRS, 6, [line_of(OURS, 5), line_of(OURS, 8)], FileState.CHANGED),
    ],
)
def test_state_of_a_file(tmp_path: Path, data: bytes, mtime_ns: int, lines: list[Any], state: FileState) -> None:
    (tmp_path / "a").write_bytes(data)
    os.utime(tmp_path / "a", ns=(mtime_ns, mtime_ns))
    assert state_of(tmp_path, lines) is state


def test_what_is_no_file_was_not_written_by_a_run(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert state_of(tmp_path, [line_of(OURS, None)]) is FileState.CHANGED


def test_touched_files_are_not_read_where_the_run_itself_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(OURS)
    monkeypatch.setattr(TargetRoot, "open_file", lambda *_, **__: pytest.fail("it was opened"))
    assert state_of(tmp_path, [line_of(OURS, 5)], read=False) is FileState.FINISHED


def test_a_file_that_was_read_need_not_be_read_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Target.open(out, IDENTITY) as target:
        file = target.create("a", len(OURS))
        file.write(0, OURS)
        file.commit({"sha256": hashlib.sha256(OURS).hexdigest()})
    os.utime(out / "a", ns=(LATER, LATER))
    with Target.open(out, IDENTITY) as target:
        assert set(target.done) == {"a"}
    last = read_line((out / WORK_FOLDER / "journal.jsonl").read_bytes().splitlines()[-1]).value
    assert last is not None and (last["file"], last["mtime_ns"]) == ("a", LATER)


def test_a_kill_while_touched_files_are_read_leaves_noted_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, opened = tmp_path / "out", TargetRoot.open_file
    with Target.open(out, IDENTITY) as target:
        for name in "a", "b":
            file = target.create(name, len(OURS))
            file.write(0, OURS)
            file.commit({"sha256": hashlib.sha256(OURS).hexdigest()})
            os.utime(out / name, ns=(LATER, LATER))
    read = []

    def killed(self: TargetRoot, name: str, *rest: Any, **more: Any) -> int:
        if name in ("a", "b"):
            read.append(name)
        if name == "b" and len(read) == 2:
            raise KeyboardInterrupt
        return opened(self, name, *rest, **more)

    monkeypatch.setattr(TargetRoot, "open_file", killed)
    with pytest.raises(KeyboardInterrupt):
        Target.open(out, IDENTITY)
    with Target.open(out, IDENTITY) as target:
        assert set(target.done) == {"a", "b"}
    assert read == ["a", "b", "b"]


def replace_bytes(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def shorten(path: Path) -> None:
    path.write_bytes(b"short")


def lengthen(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("command", FILE_OF)
@pytest.mark.parametrize("change", [replace_bytes, shorten, lengthen])
def test_a_finished_file_that_somebody_changed_is_neither_believed_nor_overwritten(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, command: str, change: Change, restart: bool
) -> None:
    run, out = run_of(command, sample_source, sample_prepared), tmp_path / "out"
    stop(run, out, "check_files")
    changed = next(path for path in sorted(out.iterdir()) if path.name.startswith(FILE_OF[command]))
    change(changed)
    theirs = changed.read_bytes()
    for _ in range(2):
        with pytest.raises(TargetError) as caught:
            run(out, restart=restart)
        assert caught.value.where == str(changed) and "Move it" in (caught.value.next_step or "")
        assert changed.read_bytes() == theirs and not (out / "config.json").exists()
    changed.rename(tmp_path / "theirs")
    run(out, restart=restart)
    run(tmp_path / "whole")
    assert file_digests(out) == file_digests(tmp_path / "whole")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("command", FILE_OF)
@pytest.mark.parametrize("place", ["check_files", "finish"])
def test_an_unfinished_target_that_was_copied_without_its_times_is_continued(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, command: str, place: str, restart: bool
) -> None:
    run, out, copy = run_of(command, sample_source, sample_prepared), tmp_path / "out", tmp_path / "copy"
    stop(run, out, place)
    shutil.copytree(out, copy, copy_function=shutil.copyfile)
    for path in copy.iterdir():
        os.utime(path, ns=(LATER, LATER))
    result = run(copy, restart=restart)
    assert result.resumed != restart
    if command != "restore" and not restart:
        assert result.written_nbytes == 0
    run(tmp_path / "whole")
    assert file_digests(copy) == file_digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["config.json", "README.md", "nvfp4_prep.json", "model.safetensors.index.json"])
def test_an_edited_small_file_of_an_unfinished_target_is_refused_at_once(
    sample_source: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    stop(run_of("convert", sample_source, sample_source), out, "finish")
    lengthen(out / name)
    edited, before = (out / name).read_bytes(), sorted(out.iterdir())
    command = ["convert", str(sample_source), str(out), "--no-smoke"]
    for options in ("--dry-run",), (), ("--restart", "--dry-run"), ("--restart",):
        result = CliRunner().invoke(cli, [*command, *options])
        assert result.exit_code == 8 and "was changed or replaced since" in " ".join(result.output.split())
    assert (out / name).read_bytes() == edited and sorted(out.iterdir()) == before


def test_touched_small_files_are_ours_for_a_run_with_other_options(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(run_of("convert", sample_source, sample_source), out, "finish")
    for path in out.iterdir():
        os.utime(path, ns=(LATER, LATER))
    options = ConvertOptions(gate_up_block=16)
    assert not convert(sample_source, out, options, smoke=None, restart=True).resumed


@pytest.mark.parametrize("options", [(), ("--restart",)])
def test_dry_run_refuses_what_the_run_refuses(sample_source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    stop(run_of("convert", sample_source, sample_source), out, "check_files")
    replace_bytes(out / EXPERTS)
    command = ["convert", str(sample_source), str(out), "--no-smoke", *options]
    for more in ("--dry-run",), ():
        result = CliRunner().invoke(cli, [*command, *more])
        assert result.exit_code == 8 and EXPERTS in result.output


def test_lines_of_earlier_releases_are_believed_as_before(sample_source: Path, tmp_path: Path) -> None:
    run, out = run_of("convert", sample_source, sample_source), tmp_path / "out"
    journal = stop(run, out, "check_files")
    values = [read_line(line).value or {} for line in journal.read_bytes().splitlines()]
    for value in values:
        value.pop("mtime_ns", None)
    journal.write_bytes(b"".join(to_line(value) for value in values))
    os.utime(out / EXPERTS)
    result = run(out)
    assert result.resumed and result.written_nbytes == 0


@pytest.mark.parametrize("command", FILE_OF)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_is_to_be_made_again_stays_where_it_was_replaced_in_between(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    run, out = run_of(command, sample_source, sample_prepared), tmp_path / "out"
    stop(run, out, "finish")
    check_names = Target.check_names

    def replaced(self: Target, *names: Any) -> None:
        check_names(self, *names)
        (out / name).unlink()
        (out / name).write_bytes(THEIRS)

    monkeypatch.setattr(Target, "check_names", replaced)
    with pytest.raises(TargetError, match="another program put there"):
        run(out)
    assert (out / name).read_bytes() == THEIRS


def test_restart_removes_no_file_that_was_replaced_while_others_were_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read = tmp_path / "out", target_module.judge_files
    with Target.open(out, IDENTITY) as target:
        file = target.create("a", len(OURS))
        file.write(0, OURS)
        file.commit({"sha256": hashlib.sha256(OURS).hexdigest()})

    def replaced(*arguments: Any, **options: Any) -> Any:
        files = list(read(*arguments, **options))
        (out / "a").write_bytes(THEIRS)
        os.utime(out / "a", ns=(LATER, LATER))
        return files

    monkeypatch.setattr(target_module, "judge_files", replaced)
    with Target.open(out, IDENTITY, restart=True):
        assert (out / "a").read_bytes() == THEIRS


def test_a_part_is_not_joined_after_its_file_was_replaced(tmp_path: Path) -> None:
    with Target.open(tmp_path / "part", IDENTITY) as part, Target.open(tmp_path / "out", IDENTITY) as target:
        file = part.create("a", len(OURS))
        file.write(0, OURS)
        file.commit({"sha256": hashlib.sha256(OURS).hexdigest()})
        (tmp_path / "part" / "a").write_bytes(THEIRS)
        os.utime(tmp_path / "part" / "a", ns=(LATER, LATER))
        with pytest.raises(TargetError, match="while this run worked"):
            target.adopt(part.done["a"], part)
    assert (tmp_path / "part" / "a").read_bytes() == THEIRS


def add_another(path: Path) -> None:
    path.with_name("notes.txt").write_bytes(THEIRS)


@pytest.mark.parametrize("option", ["--join", "--restart"])
@pytest.mark.parametrize("change", [replace_bytes, lengthen, shorten, add_another])
def test_what_somebody_put_into_the_folder_of_a_part_stays(
    sample_source: Path, tmp_path: Path, change: Change, option: str
) -> None:
    out = tmp_path / "out"
    for part in "1/2", "2/2":
        convert_part(sample_source, out, part)
    folder = part_folder(out, LayerSelection.parse("1/2"))
    changed = folder / EXPERTS
    change(changed)
    theirs = folder / "notes.txt" if change is add_another else changed
    data = theirs.read_bytes()
    for more in ("--dry-run",), ():
        result = CliRunner().invoke(cli, ["convert", str(sample_source), str(out), "--no-smoke", option, *more])
        assert result.exit_code == 8 and theirs.name in result.output
        assert theirs.read_bytes() == data
    theirs.rename(tmp_path / "theirs")
    if option == "--join" and change is not add_another:
        convert_part(sample_source, out, "1/2")
    result = CliRunner().invoke(cli, ["convert", str(sample_source), str(out), "--no-smoke", option])
    assert result.exit_code == 0


def test_a_file_of_a_part_that_was_cut_off_counts_as_missing(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part in "1/2", "2/2":
        convert_part(sample_source, out, part)
    os.truncate(part_folder(out, LayerSelection.parse("1/2")) / EXPERTS, 5000)
    for more in ("--dry-run",), ():
        result = CliRunner().invoke(cli, ["convert", str(sample_source), str(out), "--no-smoke", "--join", *more])
        assert result.exit_code == 13
    convert_part(sample_source, out, "1/2")
    join_parts(sample_source, out, smoke=None)


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--restart",), ("--restart", "--dry-run")])
def test_a_touched_file_that_cannot_be_read_is_named(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    out, opened = tmp_path / "out", os.open
    stop(run_of("convert", sample_source, sample_source), out, "check_files")
    os.utime(out / EXPERTS)

    def refused(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if path == EXPERTS:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    result = CliRunner().invoke(cli, ["convert", str(sample_source), str(out), "--no-smoke", *options])
    assert result.exit_code == 8 and f"{EXPERTS}: cannot be read (Permission denied)" in result.output


@pytest.mark.parametrize("command", FILE_OF)
def test_restart_discards_nothing_where_a_file_was_changed(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, command: str
) -> None:
    run, out = run_of(command, sample_source, sample_prepared), tmp_path / "out"
    stop(run, out, "finish")
    lengthen(next(path for path in out.iterdir() if path.name.startswith(FILE_OF[command])))
    before = file_digests(out)
    with pytest.raises(TargetError, match="was changed or replaced since"):
        run(out, restart=True)
    assert file_digests(out) == before


@pytest.mark.parametrize("options", [(), ("--restart",)])
def test_dry_run_refuses_a_target_copied_by_hard_links_as_the_run_does(
    sample_source: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    stop(run_of("convert", sample_source, sample_source), tmp_path / "out", "check_files")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=os.link)
    for more in ("--dry-run",), ():
        command = ["convert", str(sample_source), str(tmp_path / "copy"), "--no-smoke", *options, *more]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 8 and "2 hard links to one file" in " ".join(result.output.split())
