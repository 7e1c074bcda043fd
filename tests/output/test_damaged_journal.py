"""A journal with damaged lines: nothing wrong passes, nothing of a stranger's is lost, and some command goes on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nvfp4_prep import SmokePolicy, convert, convert_part, join_parts
from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import ResumeConflictError, TargetError
from nvfp4_prep.output.journal import LOST_VERDICT, Journal
from nvfp4_prep.output.journal_line import to_line
from support.cases import slow_after
from support.checkpoint_files import file_digests
from support.relayout_cases import flip
from support.stopped_runs import EXPERTS, FILE_OF, run_of, stop

Damage = Callable[[list[bytes], int], bytes]
_KEY = re.compile(rb'"(identity|file|made)": ')
DAMAGES: dict[str, Damage] = {
    "zeros": lambda lines, at: b"".join([*lines[:at], b"\0" * 50 + b"\n", *lines[at + 1 :]]),
    "not an object": lambda lines, at: b"".join([*lines[:at], b"[1]\n", *lines[at + 1 :]]),
    "without its newline": lambda lines, at: b"".join([*lines[:at], lines[at][:-1] + b" ", *lines[at + 1 :]]),
    "another key": lambda lines, at: b"".join([*lines[:at], _KEY.sub(b'"x": ', lines[at]), *lines[at + 1 :]]),
    "gone with what follows": lambda lines, at: b"".join(lines[:at]),
    "cut off": lambda lines, at: b"".join(lines[:at]) + lines[at][:14],  # before its key,
}


def damage(journal: Path, place: bytes, how: str) -> None:
    """Damage the first line that has some text."""
    lines = journal.read_bytes().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if place in line)
    journal.write_bytes(DAMAGES[how](lines, at))


CASES = [(command, how) for how in DAMAGES for command in FILE_OF]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("command", "how"), slow_after(1, CASES))
def test_a_file_whose_line_is_damaged_is_made_again(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, command: str, how: str, restart: bool
) -> None:
    run, out = run_of(command, sample_source, sample_prepared), tmp_path / "out"
    damage(stop(run, out, "check_files"), f'"file": "{FILE_OF[command]}'.encode(), how)
    result = run(out, restart=restart)
    assert result.resumed != restart and result.written_nbytes > 0
    run(tmp_path / "whole")
    assert file_digests(out) == file_digests(tmp_path / "whole")


MADE = ("model.safetensors.index.json", "README.md", "nvfp4_prep.json", "config.json")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("command", ["convert", "relayout"])
@pytest.mark.parametrize("name", slow_after(1, MADE))
def test_a_made_file_whose_line_is_damaged_is_made_again(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, command: str, name: str, restart: bool
) -> None:
    run, out = run_of(command, sample_source, sample_prepared), tmp_path / "out"
    damage(stop(run, out, "finish"), f'"made": "{name}"'.encode(), "cut off")
    if command == "convert" and not restart:  # a verdict may have followed
        with pytest.raises(ResumeConflictError, match="may have said that the smoke test"):
            run(out)
        assert convert(sample_source, out, smoke=SmokePolicy()).resumed
    run(out, restart=restart)
    run(tmp_path / "whole")
    assert file_digests(out) == file_digests(tmp_path / "whole")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("how", slow_after(1, DAMAGES))
def test_a_strangers_file_that_looks_like_ours_stays(
    sample_source: Path, tmp_path: Path, how: str, restart: bool
) -> None:
    """It has the size and the header of ours, and the journal is damaged where ours was named."""
    run, out = run_of("convert", sample_source, sample_source), tmp_path / "out"
    damage(stop(run, out, "check_files"), f'"file": "{EXPERTS}"'.encode(), how)
    flip(out / EXPERTS, (out / EXPERTS).stat().st_size - 1)
    mine = (out / EXPERTS).read_bytes()
    for _ in range(2):  # the first run must not take it for its own: the second would keep it, or --restart delete it
        with pytest.raises(TargetError, match="has other bytes than the file that was made for its place") as caught:
            run(out, restart=restart)
        assert (out / EXPERTS).read_bytes() == mine and not (out / "config.json").exists()
    assert "Move it out" in (caught.value.next_step or "")
    (out / EXPERTS).rename(tmp_path / "mine")
    assert run(out).resumed
    run(tmp_path / "whole")
    assert file_digests(out) == file_digests(tmp_path / "whole")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["README.md", "config.json", "nvfp4_prep.json", EXPERTS, "fifo", "link"])
@pytest.mark.slow
def test_what_does_not_look_like_ours_is_refused_at_once(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, name: str, restart: bool
) -> None:
    run, out = run_of("convert", sample_source, sample_source), tmp_path / "out"
    journal = stop(run, out, "check_files")
    damage(journal, f'"file": "{EXPERTS}"'.encode(), "zeros")
    (out / EXPERTS).unlink()
    place = out / (EXPERTS if name in ("fifo", "link") else name)
    if name == "fifo":
        os.mkfifo(place)
    elif name == "link":
        place.symlink_to(sample_prepared / EXPERTS)
    else:
        place.write_text("mine")
    before = place.lstat()
    kind = {"fifo": r" \(a FIFO\)", "link": r" \(a symbolic link\)"}.get(name, "")
    with pytest.raises(TargetError, match=rf"holds a file of something else{kind}\. Move it away"):
        run(out, restart=restart)
    assert os.path.samestat(place.lstat(), before) and place.lstat().st_mtime_ns == before.st_mtime_ns
    words = ["convert", str(sample_source), str(out), "--no-smoke", "--dry-run", *(["--restart"] if restart else [])]
    assert CliRunner().invoke(cli, words).exit_code == 8


@pytest.mark.parametrize("how", slow_after(1, [how for how in DAMAGES if "gone" not in how and "cut" not in how]))
@pytest.mark.parametrize("command", FILE_OF)
def test_the_advice_on_a_damaged_first_line_helps(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, command: str, how: str
) -> None:
    run, out = run_of(command, sample_source, sample_prepared), tmp_path / "out"
    damage(stop(run, out, "check_files"), b'"identity": ', how)
    with pytest.raises(ResumeConflictError, match=r"journal is damaged.*Only --restart helps"):
        run(out)
    run(out, restart=True)
    run(tmp_path / "whole")
    assert file_digests(out) == file_digests(tmp_path / "whole")


def test_lines_of_two_runs_are_no_journal(sample_source: Path, tmp_path: Path) -> None:
    run, out = run_of("convert", sample_source, sample_source), tmp_path / "out"
    journal = stop(run, out, "check_files")
    with journal.open("ab") as stream:
        stream.write(to_line({"identity": {"options": 1}}))
    with pytest.raises(ResumeConflictError, match=r"journal is damaged.*Only --restart helps"):
        run(out)
    assert not run(out, restart=True).resumed


@pytest.mark.parametrize("begun", [False, True], ids=["part", "join"])
@pytest.mark.slow
def test_the_advice_on_a_first_line_helps_a_join(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, begun: bool
) -> None:
    """A join has no --restart: the part is made anew or, where the join was begun, all of them."""
    out = tmp_path / "out"
    part = convert_part(sample_source, out, "1/1").path
    journal = part / WORK_FOLDER / "journal.jsonl"
    if begun:
        journal = stop(lambda target: join_parts(sample_source, target), out, "check_files")
    damage(journal, b'"identity": ', "zeros")
    words = ["convert", str(sample_source), str(out), "--join", "--no-smoke", "-q"]
    done, dry = CliRunner().invoke(cli, words), CliRunner().invoke(cli, [*words, "--dry-run"])
    advice = "remove the directory and make its parts again" if begun else "make that part anew: its own command with"
    assert done.exit_code == dry.exit_code == 7 and "journal is damaged" in done.stderr
    assert advice in done.stderr and advice in dry.output
    if begun:
        shutil.rmtree(out)
    convert_part(sample_source, out, "1/1", restart=not begun)
    join_parts(sample_source, out)
    assert file_digests(out) == file_digests(sample_prepared)


@pytest.mark.parametrize("how", slow_after(1, DAMAGES))
def test_a_join_goes_on_where_a_line_is_damaged(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, how: str
) -> None:
    """The file was moved out of its part: no part can be joined again for it."""
    out = tmp_path / "out"
    convert_part(sample_source, out, "1/1")
    journal = stop(lambda target: join_parts(sample_source, target), out, "check_files")
    damage(journal, f'"file": "{EXPERTS}"'.encode(), how)
    assert join_parts(sample_source, out).resumed
    assert file_digests(out) == file_digests(sample_prepared)


@pytest.mark.parametrize("how", slow_after(1, DAMAGES))
def test_no_smoke_test_is_due_before_a_manifest_was_written(sample_source: Path, tmp_path: Path, how: str) -> None:
    run, out = run_of("convert", sample_source, sample_source), tmp_path / "out"
    damage(stop(run, out, "check_files"), b'"file": ', how)
    assert "nvfp4_prep.json" not in {path.name for path in out.iterdir()}
    assert run(out).smoke is None


IDENTITY = to_line({"identity": {"a": 1}})
FILE = to_line({"file": "a", "nbytes": 1, "sha256": "0" * 64, "digests": {}, "facts": []})
VERDICT = to_line({"verdict": "wrong", "layers": [1], "samples": None})


@pytest.mark.parametrize(
    ("text", "broken", "hides", "tail"),
    [
        (b"", True, False, False),
        (IDENTITY + FILE + VERDICT, False, False, False),
        (IDENTITY[:-9] + b"\n" + FILE, True, True, False),
        (FILE + IDENTITY, True, False, False),
        (IDENTITY + IDENTITY, False, False, False),
        (IDENTITY + to_line({"identity": {"a": 2}}), True, False, False),
        (IDENTITY + VERDICT.replace(b"verdict", b"verdicu"), False, True, False),
        (IDENTITY + FILE.replace(b'"nbytes": 1', b'"nbytes": 2'), False, False, False),
        (IDENTITY + FILE[:-1] + VERDICT, False, True, False),
        (IDENTITY + b'{"file": "a", "nbytes": 1}\n', False, False, False),
        (IDENTITY + FILE[:-1], False, False, False),
        (IDENTITY + FILE[:40], False, False, False),
        (IDENTITY + FILE[:20], False, False, True),
        (IDENTITY + VERDICT[:-1], False, False, True),
        (IDENTITY + VERDICT[:40], False, False, True),
        (IDENTITY + FILE[:-1] + VERDICT[:-1], False, False, True),
        (IDENTITY + b"\0" * 9, False, False, True),
        (IDENTITY + to_line(LOST_VERDICT), False, False, False),
    ],
)
def test_what_a_damaged_journal_still_tells(text: bytes, broken: bool, hides: bool, tail: bool) -> None:
    journal = Journal.parse(text)
    assert (journal.is_broken, journal.may_hide_verdict, journal.doubtful_tail) == (broken, hides, tail)
