"""Signals that come when a command has printed its result do not change its exit code."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MAIN = [sys.executable, "-c", "from nvfp4_prep.cli import main; main()"]


def _ended_by(command: list[str], number: int, delay_s: float, *, times: int = 1) -> tuple[int, str]:
    """Exit code and stderr of a command that gets signals so long after its first line of output."""
    with subprocess.Popen([*MAIN, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(delay_s)
        for _ in range(times):
            process.send_signal(number)
        messages = process.communicate()[1]
    return process.returncode, messages


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.0005, 0.01, 0.05, 0.1, 0.2])
def test_a_signal_after_the_result_of_a_success(sample_prepared: Path, number: int, delay_s: float) -> None:
    code, messages = _ended_by(["verify", str(sample_prepared), "--quick", "-q"], number, delay_s, times=3)
    assert (code, messages) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.0005, 0.05, 0.15])
def test_a_signal_after_a_failure_was_told(sample_prepared: Path, tmp_path: Path, number: int, delay_s: float) -> None:
    copy = Path(shutil.copytree(sample_prepared, tmp_path / "copy"))
    (copy / "expert-scales.safetensors").unlink()
    code, messages = _ended_by(["verify", str(copy), "--quick", "-q"], number, delay_s)
    assert code == 6 and messages.startswith("next: Do not serve this checkpoint") and messages.count("\n") == 1


def test_a_signal_after_a_conversion(sample_source: Path, tmp_path: Path) -> None:
    command = ["convert", str(sample_source), str(tmp_path / "out"), "-q", "--no-smoke"]
    code, messages = _ended_by(command, signal.SIGTERM, 0.0005)
    assert code == 0 and messages.startswith("next: nvfp4-prep verify")


_BLOCKED = """
import os
os.set_blocking(1, False)
try:
    while True: os.write(1, bytes(4096))
except BlockingIOError:
    os.set_blocking(1, True)
from nvfp4_prep.cli import main
main()
"""


def test_a_reader_that_takes_nothing_can_be_left() -> None:
    """A result that waits for its reader is not printed yet: Ctrl-C ends the waiting. One that comes while the program
    takes the result for printed is ignored, so a slow machine may need another.
    """
    command = [sys.executable, "-c", _BLOCKED, "completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(3)
        assert process.poll() is None
        try:
            for _ in range(30):
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                    break
            assert process.poll() == 130
        finally:
            process.kill()
