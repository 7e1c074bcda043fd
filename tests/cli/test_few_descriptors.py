"""Processes that may open no more files: one message from every command, whatever it was about to open."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nvfp4_prep.cli import cli
from nvfp4_prep.cli.output import report_errors
from nvfp4_prep.errors import LoadError, OpenFilesError
from nvfp4_prep.prepared.problems import Problems
from support.cases import slow_after

NO_SMOKE = ("--no-smoke", "-q")
COMMANDS: dict[str, Callable[[Path, Path, Path], tuple[object, ...]]] = {
    "inspect": lambda source, prepared, out: ("inspect", source),
    "inspect prepared": lambda source, prepared, out: ("inspect", prepared),
    "convert": lambda source, prepared, out: ("convert", source, out, *NO_SMOKE),
    "dry run": lambda source, prepared, out: ("convert", source, out, "--dry-run"),
    "complete": lambda source, prepared, out: ("convert", source, prepared, *NO_SMOKE),
    "verify": lambda source, prepared, out: ("verify", prepared),
    "verify with source": lambda source, prepared, out: ("verify", prepared, "--source", source),
    "restore": lambda source, prepared, out: ("restore", prepared, out),
    "relayout": lambda source, prepared, out: ("relayout", prepared, out, "--layout", "trtllm"),
    "restamp": lambda source, prepared, out: ("restamp", prepared),
}


def run(arguments: tuple[object, ...]) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def descriptors() -> Iterator[Callable[[int | None], None]]:
    """Leaves the process this many more descriptors, or all that it had."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers: list[int] = []

    def limit(more: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        while fillers:
            os.close(fillers.pop())
        if more is not None:
            used = max(int(link.name) for link in Path("/proc/self/fd").iterdir())
            while not fillers or fillers[-1] < used:  # no gap is left below
                fillers.append(os.open(os.devnull, os.O_RDONLY))
            resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + more, before[1]))

    yield limit
    limit(None)


@pytest.mark.parametrize("name", slow_after(2, COMMANDS))
def test_every_command_says_the_same(
    sample_source: Path, sample_prepared: Path, tmp_path: Path, name: str, descriptors: Callable[[int | None], None]
) -> None:
    prepared = Path(shutil.copytree(sample_prepared, tmp_path / "prepared"))
    command = COMMANDS[name](sample_source, prepared, tmp_path / "out")
    assert run(command).exit_code == 0  # and everything is imported
    codes = []
    for more in range(9):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        descriptors(more)
        result = run(command)
        descriptors(None)
        codes.append(result.exit_code)
        if result.exit_code:
            assert result.exit_code == 1, (more, result.output)
            assert "Too many open files" in result.stderr
            assert "a limit of" in result.stderr
            assert "Raise it (`ulimit -n 1024`)" in result.stderr
            assert "permissions" not in result.stderr
            assert result.stderr.count("error: ") == 1
    assert codes[0] == 1
    assert run(command).exit_code == 0  # whatever was left, the same command continues


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "/usr/lib/python3/torch/x.py"),
        OSError(errno.ENFILE, "Too many open files in system", "/tmp/.nvfp4_prep"),
        ImportError("libtorch.so: cannot open shared object file: Too many open files"),
    ],
)
def test_what_nobody_foresaw_says_it_too(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, report_errors(False):
        raise error
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: Too many open files; found a limit of ")
    assert "ulimit -n" in said


def test_it_is_no_verdict_on_a_checkpoint() -> None:
    problems = Problems()
    with pytest.raises(OpenFilesError):
        problems.add_error("x", OpenFilesError("Too many open files"))
    assert not problems.found
    assert issubclass(OpenFilesError, LoadError)
