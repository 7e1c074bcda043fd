"""One clear error where the system is not Linux."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from nvfp4_prep import convert
from nvfp4_prep._util.system import check_linux, start_thread
from nvfp4_prep.cli import cli
from nvfp4_prep.errors import NvfpPrepError, UsageError


def test_linux_passes() -> None:
    check_linux()


@pytest.mark.parametrize("name", ["sched_getaffinity", "posix_fallocate"])
def test_other_systems_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.delattr(os, name)
    done = CliRunner().invoke(cli, ["convert", str(tmp_path), str(tmp_path / "out")])
    assert done.exit_code == UsageError.exit_code
    assert done.stderr.startswith("error: needs Linux") and len(done.stderr.splitlines()) == 1
    with pytest.raises(UsageError, match=f"needs Linux.*{name}"):
        convert(tmp_path, tmp_path / "out")
    assert CliRunner().invoke(cli, ["convert", "--help"]).exit_code == 0


def test_no_more_threads_is_one_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(NvfpPrepError, match="cannot start a thread: the system allows no more"):
        start_thread(threading.Thread(target=print))
