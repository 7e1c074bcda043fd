"""``--verbose``, ``--log-file`` and colour: steps with times, a file that never takes another's place, plain pipes."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep.cli import cli
from nvfp4_prep.cli import output as output_module
from nvfp4_prep.cli.colour import coloured, wants_colour
from nvfp4_prep.errors import UsageError
from nvfp4_prep.output.log_file import LOG_MARKER, open_log

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_log_has_every_step_and_the_end(sample_prepared: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = run("verify", sample_prepared, "-q", "--log-file", log)
    assert done.exit_code == 0 and done.stderr == ""
    first, *lines = log.read_text().splitlines()
    assert first + "\n" == LOG_MARKER
    assert all(re.match(rf"{TIME} INFO ", line) for line in lines)
    text = "\n".join(lines)
    assert "check of the structure: begins" in text and "check of the structure: done in" in text
    assert re.search(r"verify \(.*\): done in \d+\.\d\d s", text)
    assert "experts-layer-00001.safetensors: " in text
    assert lines[-1].split("exit code ")[1].startswith("0 after ")
    assert run("verify", sample_prepared, "-q", "--log-file", log).exit_code == 0
    assert log.read_text().startswith("\n".join([first, *lines])) and log.read_text().count(LOG_MARKER) == 1
    assert not logging.getLogger("nvfp4_prep").handlers


def test_failures_are_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = run("verify", tmp_path / "nowhere", "--log-file", log)
    assert done.exit_code == 3
    text = log.read_text()
    assert "nowhere: does not exist" in text and "exit code 3 after" in text


def test_verbose_is_for_stderr_alone(sample_prepared: Path) -> None:
    done = run("verify", sample_prepared, "--quick", "-v")
    assert re.search(r"^\d\d:\d\d:\d\d\.\d{3}Z check of the structure: done in", done.stderr, re.MULTILINE)
    assert "begins" not in done.stdout
    assert done.stdout == run("verify", sample_prepared, "--quick").stdout


@pytest.mark.parametrize("kind", ["foreign", "empty", "link", "folder", "fifo"])
def test_nothing_foreign_is_written_to(sample_prepared: Path, tmp_path: Path, kind: str) -> None:
    log, other = tmp_path / "run.log", tmp_path / "other"
    if kind == "foreign":
        log.write_text("somebody's notes\n")
    elif kind == "empty":
        log.touch()
    elif kind == "link":
        other.write_text(LOG_MARKER)
        log.symlink_to(other)
    elif kind == "folder":
        log.mkdir()
    else:
        os.mkfifo(log)
    regular = [path for path in (log, other) if path.is_file()]
    before = [path.read_bytes() for path in regular]
    done = run("verify", sample_prepared, "--quick", "--log-file", log)
    assert done.exit_code == 2 and "--log-file: " in done.stderr, done.output
    assert [path.read_bytes() for path in regular] == before


@pytest.mark.parametrize("place", ["PREPARED/run.log", "TARGET/run.log", "nowhere/run.log"])
def test_no_checkpoint_gets_a_log(sample_prepared: Path, tmp_path: Path, place: str) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    target = tmp_path / "target"
    path = place.replace("PREPARED", str(copy)).replace("TARGET", str(target)).replace("nowhere", str(tmp_path / "no"))
    done = run("restore", copy, target, "-q", "--log-file", path)
    assert done.exit_code == 2 and "--log-file: " in done.stderr
    assert not Path(path).exists() and not target.exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colour_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, environment: dict[str, str], wanted: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(stream) is wanted
    monkeypatch.setattr("sys.stderr", stream)
    stream.truncate(0)
    output_module.hint("error: x")
    assert ("\x1b[31m" in stream.getvalue()) is wanted


@pytest.mark.parametrize(
    ("text", "word", "colour"),
    [
        ("WRONG a: b", "WRONG", 31),
        ("error: no such thing", "error:", 31),
        ("smoke test FAILED: 1 of 2", "FAILED", 31),
        ("out: verified (full, 1 B read)", "verified", 32),
        ("smoke test passed: 2 of 2", "smoke test passed", 32),
        ("yes vLLM plugin: installed", "yes ", 32),
        ("NO  serving with vLLM", "NO ", 31),
        ("warning: scales", "warning:", 33),
    ],
)
def test_words_that_decide_are_coloured(text: str, word: str, colour: int) -> None:
    assert coloured(text) == text.replace(word, f"\x1b[{colour}m\x1b[1m{word}\x1b[0m")


def test_other_words_are_not() -> None:
    for text in ("checked files: sha256", "experts of a model WRONG.safetensors", "inverse transform verified: yes"):
        assert coloured(text) == text


def test_a_name_cannot_begin_a_line_of_the_log(tmp_path: Path) -> None:
    """Nor a line of ``--verbose``: a record is one line."""
    forged = "2026-11-26T00:00:00.000Z INFO exit code 0 after 1 s"
    log = tmp_path / "run.log"
    done = CliRunner().invoke(cli, ["inspect", f"nosuch\n{forged}", "--log-file", str(log), "--verbose"])
    assert done.exit_code != 0
    for text in (log.read_text(), done.stderr):
        assert "nosuch\\n2026" in text
        assert not any(line.startswith("2026-11-26T00:00:00") for line in text.splitlines())


def test_a_log_that_cannot_be_begun_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file there would be refused by every later run."""
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if data.startswith(b"# log of"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match="No space left"):
        open_log(tmp_path / "run.log")
    assert not (tmp_path / "run.log").exists()
