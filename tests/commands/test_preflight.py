"""``convert --dry-run`` says what the run itself would meet at its target, and touches nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep import relayout, restore
from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.cli import cli
from nvfp4_prep.commands.convert import convert
from nvfp4_prep.commands.convert_parts import convert_part, join_parts
from nvfp4_prep.commands.preflight import look_ahead
from nvfp4_prep.errors import TargetError, UnsupportedCheckpointError
from nvfp4_prep.output.sink import KeepFiles
from nvfp4_prep.output.target_checks import has_journal
from nvfp4_prep.planning.builder import make_plan


class Stop(Exception):
    """Ends a conversion after its first file."""


class StopAtFirst(KeepFiles):
    def file_done(self, name: str, path: Path, nbytes: int, sha256: str | None) -> None:
        raise Stop


def begin(source: Path, out: Path) -> None:
    with pytest.raises(Stop):
        convert(source, out, sink=StopAtFirst(), threads=1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below, with its size and time."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def line(result: Result) -> str:
    """The plan's line about the target."""
    (found,) = [text for text in result.stdout.splitlines() if text.startswith("target   ")]
    return found


def same_as_the_run(source: Path, out: Path, *options: str) -> str:
    """The target's line of a dry run that touches nothing and has the exit code and the reason of the run itself."""
    before = files(out.parent)
    foreseen = run("convert", source, out, "--dry-run", *options)
    value = json.loads(run("convert", source, out, "--dry-run", "--json", *options).stdout)["target"]
    assert files(out.parent) == before
    real = run("convert", source, out, "-q", "--no-smoke", *options)
    assert foreseen.exit_code == real.exit_code, (foreseen.output, real.output)
    assert (value["refusal"] is not None) == bool(real.exit_code)
    if real.exit_code:
        assert value["refusal"]["exit_code"] == real.exit_code
        assert foreseen.stderr == real.stderr
        assert line(foreseen) == f"target   refused with exit code {real.exit_code}: {real.stderr[7:].strip()}"
    return line(foreseen)


@pytest.mark.slow
def test_life_of_a_target(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert line(run("convert", sample_source, out, "--dry-run")).startswith(f"target   {out} is new; ")
    assert not (tmp_path / "new").exists()
    begin(sample_source, out)
    assert " continues an unfinished run: 1 finished file is there; " in same_as_the_run(sample_source, out)
    assert same_as_the_run(sample_source, out).endswith("out is complete already: nothing would be written")
    (out / "config.json").write_text("{}")
    assert "damaged" in same_as_the_run(sample_source, out)


@contextmanager
def held(out: Path) -> Iterator[None]:
    descriptor = os.open(out / WORK_FOLDER / "lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_refusals(sample_source: Path, tmp_path: Path) -> None:
    foreign, begun = tmp_path / "foreign", tmp_path / "begun"
    foreign.mkdir()
    (foreign / "mine").write_text("x")
    assert "exit code 8" in same_as_the_run(sample_source, foreign)
    assert "exit code 8" in same_as_the_run(sample_source, foreign / "mine")
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    assert "exit code 8" in same_as_the_run(source, source / "out")
    begin(sample_source, begun)
    assert "options.gate_up_block was 64, now 16" in same_as_the_run(sample_source, begun, "--gate-up-block", "16")
    with held(begun):
        assert "exit code 9" in same_as_the_run(sample_source, begun)
    assert "exit code 7" in same_as_the_run(sample_source, begun, "--layers", "1/2")
    (begun / "mine").write_text("x")
    assert "exit code 8" in same_as_the_run(sample_source, begun)
    (begun / "mine").unlink()
    foreseen = run("convert", sample_source, begun, "--dry-run", "--restart", "--gate-up-block", "16")
    assert f"target   {begun} is new; " in foreseen.stdout
    assert has_journal(begun)


def test_a_part_at_work_is_not_discarded(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    part = convert_part(sample_source, out, "1/2").path
    with held(part):
        assert "exit code 9" in same_as_the_run(sample_source, out, "--restart")
    assert has_journal(part)
    assert run("convert", sample_source, out, "-q", "--no-smoke", "--restart").exit_code == 0


@pytest.mark.parametrize("options", [{}, {"restart": True}])
def test_a_run_refuses_before_it_opens_its_target(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    """So what the dry run says is what the run says: by the same call."""

    def refuse(*arguments: object, **given: object) -> None:
        raise TargetError("refused by the preflight")

    monkeypatch.setattr("nvfp4_prep.commands.preflight.find_complete", refuse)
    with pytest.raises(TargetError, match="refused by the preflight"):
        convert(sample_source, tmp_path / "out", **options)
    with pytest.raises(TargetError, match="refused by the preflight"):
        convert_part(sample_source, tmp_path / "out", "1/2", **options)
    with pytest.raises(TargetError, match="refused by the preflight"):
        join_parts(sample_source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_and_join(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "exit code 13" in same_as_the_run(sample_source, out, "--join")
    assert " is new; " in same_as_the_run(sample_source, out, "--layers", "1/2")
    assert " continues an unfinished run: 2 finished files are there" in same_as_the_run(
        sample_source, out, "--layers", "1/2"
    )
    assert "exit code 13" in same_as_the_run(sample_source, out, "--join")
    assert "exit code 7" in same_as_the_run(sample_source, out)
    assert run("convert", sample_source, out, "--layers", "2/2").exit_code == 0
    assert " joins parts: 4 finished files are there; " in same_as_the_run(sample_source, out, "--join")
    assert "is complete already" in same_as_the_run(sample_source, out, "--layers", "1/2")


@pytest.mark.slow
@pytest.mark.parametrize("missing_nbytes", [0, 1])
def test_the_plan_and_the_check_have_one_figure(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing_nbytes: int
) -> None:
    plan = json.loads(run("convert", sample_source, tmp_path / "out", "--dry-run", "--json").stdout)
    needed = plan["peak_disk_nbytes"]
    assert needed == plan["output_nbytes"] + plan["small_files_nbytes"] == plan["target"]["needed_nbytes"]
    for module in ("output.target", "commands.preflight"):
        monkeypatch.setattr(f"nvfp4_prep.{module}.free_nbytes", lambda path: needed - missing_nbytes)
    text = run("convert", sample_source, tmp_path / "out", "--dry-run").stdout
    assert "source shards" not in text  # of downloads alone
    assert f"peak {format_nbytes(needed)}\n" in text
    assert ("exit code 5" in same_as_the_run(sample_source, tmp_path / "out")) == bool(missing_nbytes)
    assert f"{format_nbytes(needed)} needed, " in text


def test_what_a_run_deletes_first_counts_as_free(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half files of a killed run; with --restart, everything of it."""
    out = tmp_path / "out"
    begin(sample_source, out)
    (finished,) = out.glob("*.safetensors")
    half = out / WORK_FOLDER / "writing-host-1" / "x"
    half.parent.mkdir()
    half.write_bytes(b"1" * 10_000_000)
    download = out / WORK_FOLDER / "source" / "shard"
    download.parent.mkdir()
    download.write_bytes(b"1" * 5_000_000)
    monkeypatch.setattr("nvfp4_prep.commands.preflight.free_nbytes", lambda path: 10**12)

    def freed(*options: str) -> int:
        value = json.loads(run("convert", sample_source, out, "--dry-run", "--json", *options).stdout)
        return int(value["target"]["free_nbytes"]) - 10**12

    blocks = {path: path.stat().st_blocks * 512 for path in (half, finished)}
    assert freed() == blocks[half] >= 10_000_000
    assert freed("--restart") == blocks[half] + blocks[finished]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_every_command_refuses_and_leaves_nothing(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    out = tmp_path / "a" / "out"
    runs = (
        lambda: convert(sample_source, out),
        lambda: convert_part(sample_source, out, "1/1"),
        lambda: restore(sample_prepared, out),
        lambda: relayout(sample_prepared, out, gate_up_block=16),
    )
    for run in runs:
        with pytest.raises(TargetError, match="has no locks"):
            run()
    source = LocalSource(sample_source)
    outlook = look_ahead(make_plan(source), source, out, KeepFiles())
    assert outlook.refusal is not None
    assert "has no locks" in outlook.refusal.what
    assert not (tmp_path / "a").exists()


def test_a_lock_that_fails_only_when_it_is_taken_leaves_nothing(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_exclusive(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_exclusive)
    with pytest.raises(TargetError, match="has no locks"):
        convert(sample_source, tmp_path / "a" / "out")
    assert not (tmp_path / "a").exists()


def test_a_target_that_cannot_be_written_is_foreseen(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system, or no permission: root may write anywhere, so the system's answer is played."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    assert "exit code 8" in same_as_the_run(sample_source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_target_may_be_read_only(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(sample_source, tmp_path / "out", smoke=None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert convert(sample_source, tmp_path / "out", smoke=None).already_complete


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (8, "convert SOURCE CLOSED"),
        (8, "convert SOURCE CLOSED --dry-run"),
        (8, "restore PREPARED CLOSED"),
        (8, "relayout PREPARED CLOSED --layout trtllm"),
        (3, "convert CLOSED OUT"),
        (3, "verify CLOSED"),
        (3, "inspect CLOSED"),
        (3, "restore CLOSED OUT"),
    ],
)
@pytest.mark.slow
def test_a_place_that_may_not_be_entered(
    sample_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: str
) -> None:
    convert(sample_source, tmp_path / "prepared", smoke=None)
    closed = tmp_path / "closed"
    for name in ("stat", "lstat"):
        real = getattr(os, name)

        def refuse(path: Any, *rest: Any, real: Any = real, **options: Any) -> Any:
            if isinstance(path, str | Path) and Path(path).is_relative_to(closed):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *rest, **options)

        monkeypatch.setattr(os, name, refuse)
    places = {"SOURCE": sample_source, "PREPARED": tmp_path / "prepared", "CLOSED": closed / "x", "OUT": tmp_path / "o"}
    done = run(*(places.get(word, word) for word in line.split()), "-q")
    assert done.exit_code == code, done.output
    assert "Permission denied" in done.output


def test_nothing_is_written_into_a_source_that_is_mounted_twice(tmp_path: Path, sample_source: Path) -> None:
    source = Path(shutil.copytree(sample_source, tmp_path / "real" / "source"))
    again = tmp_path / "again"
    again.mkdir()
    mount = subprocess.run(["mount", "--bind", source.parent, again], capture_output=True)
    if mount.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        before = sorted(source.rglob("*"))
        with pytest.raises(TargetError, match="one lies in the other"):
            convert(source, again / "source" / "out")
        with pytest.raises(TargetError, match="one lies in the other"):
            convert(again / "source", source.parent)
        assert sorted(source.rglob("*")) == before
    finally:
        subprocess.run(["umount", again], check=True)


def test_a_source_with_the_manifests_name_in_it_is_refused(sample_source: Path, tmp_path: Path) -> None:
    """What convert takes, ``verify --source`` must take; this one it would call a prepared checkpoint."""
    source = Path(shutil.copytree(sample_source, tmp_path / "source"))
    (source / "nvfp4_prep.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpointError, match="rename that file"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", ["complete", "refused"])
def test_no_time_is_told_where_nothing_would_be_done(sample_source: Path, tmp_path: Path, state: str) -> None:
    out = tmp_path / "out"
    if state == "complete":
        convert(sample_source, out, smoke=None)
    else:
        out.mkdir()
        (out / "mine").write_text("x")
    said = run("convert", sample_source, out, "--dry-run").stdout
    assert "\ntime " not in said and "\ntarget   " in said


def test_a_failed_smoke_run_is_foreseen(sample_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(sample_source, out)
    with (out / WORK_FOLDER / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"verdict": "wrong", "layers": [1], "samples": None}) + "\n")
    done = run("convert", sample_source, out, "--dry-run", "--no-smoke")
    assert done.exit_code == 7 and "smoke test of these files failed" in done.stderr
    assert run("convert", sample_source, out, "--dry-run").exit_code == 0
    assert run("convert", sample_source, out, "--no-smoke").exit_code == 7
