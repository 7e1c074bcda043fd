"""Links and special files in a target: refused, and nothing behind them touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvfp4_prep.checkpoint.filenames import WORK_FOLDER
from nvfp4_prep.errors import TargetError
from nvfp4_prep.output.target import Target


@pytest.mark.parametrize("place", ["", "leftover", "journal.jsonl", "lock", "parts"])
def test_link_in_the_work_folder_is_refused(tmp_path: Path, place: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    link = tmp_path / "out" / WORK_FOLDER / place
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / "precious" if "l" in place else victim)
    with pytest.raises(TargetError):
        Target(tmp_path / "out", {"a": 1})
    assert (victim / "precious").read_text() == "x"


def test_fifo_as_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / WORK_FOLDER).mkdir()
    os.mkfifo(tmp_path / WORK_FOLDER / "journal.jsonl")
    with pytest.raises(TargetError):
        Target(tmp_path, {"a": 1})


def test_restart_does_not_delete_behind_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("x")
    with Target(tmp_path / "out", {"a": 1}) as target:
        target.note({"file": "d/file", "nbytes": 1, "sha256": "0" * 64})
    (tmp_path / "out" / "d").symlink_to(victim)
    with pytest.raises(TargetError):
        Target(tmp_path / "out", {"a": 1}, restart=True)
    assert (victim / "file").read_text() == "x"


def test_deep_journal_line_and_nan(tmp_path: Path) -> None:
    with Target(tmp_path, {"a": float("nan")}) as target:
        target.note({"file": "x", "nbytes": 1, "sha256": "0" * 64})
    with (tmp_path / WORK_FOLDER / "journal.jsonl").open("ab") as stream:
        stream.write(b"[" * 100_000 + b"\n")
    with Target(tmp_path, {"a": float("nan")}) as target:
        assert target.resumed
