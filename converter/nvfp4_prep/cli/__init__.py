"""The command line: a thin shell around the library's functions of the same names.

One module for a command. Data goes to stdout, progress and hints to stderr; errors are one line, those of the command
line itself too. torch is imported by the commands when they run, not by ``--help``.

This module is the entry point: it takes the signals before it imports anything large.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import select
import signal
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from nvfp4_prep.cli.frame import framed
from nvfp4_prep.errors import ConversionInterrupted, NvfpPrepError

if TYPE_CHECKING:
    from types import FrameType

    from nvfp4_prep.cli.commands import cli

__all__ = ["cli", "main"]

_DEAF_S = 2.0
"""How long signals are ignored after a result was printed: the command ends within milliseconds."""
_result_printed_s: list[float] = []
"""When results were printed; infinity stands for one that is being printed."""


def __getattr__(name: str) -> Any:
    if name != "cli":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.commands").cli


def main() -> None:
    """Run ``nvfp4-prep``."""
    try:
        _keep_standard_descriptors()
        _show_what_cannot_be_encoded()
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
                signal.signal(number, _interrupt)
        from nvfp4_prep._util.printable import escape_logs
        from nvfp4_prep.cli.commands import cli
        from nvfp4_prep.cli.output import on_result

        escape_logs()
        on_result(lambda printed: _result_printed_s.append(time.monotonic() if printed else math.inf))
        cli(prog_name="nvfp4-prep")
    except KeyboardInterrupt:  # between two imports, or where no command had begun
        _end(_interrupted())
    except (OSError, ImportError) as error:
        from nvfp4_prep._util.system import open_files_error

        none_left = open_files_error(error)
        if none_left is None:
            raise
        _end(none_left)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the exit code is decided: Python's own end must not change it
            signal.signal(number, signal.SIG_IGN)
        _forget_unread_result()
        _forget_unwritten_log()


def _forget_unread_result() -> None:
    """Let what an interrupt left in stdout's buffer go nowhere if its reader takes nothing: Python's own end would wait
    for that reader, deaf to Ctrl-C. A result that was printed was flushed, so nothing of it is lost.
    """
    with contextlib.suppress(OSError, ValueError):
        if not select.select([], [1], [], 0)[1]:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise for Ctrl-C and SIGTERM alike. While a module is imported, the process ends here and now: native modules
    lose an exception that is raised in the middle of their import, or abort. Wherever it ends, the same command
    continues. Right after the result was printed they come too late to change anything, and are ignored.
    """
    if _comes_after_the_result():
        return
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(_interrupted())
        frame = frame.f_back
    raise KeyboardInterrupt


def _comes_after_the_result() -> bool:
    """Return whether the result was just printed, or is being printed to a reader that takes it.

    A reader that does not take it may be waited for in vain.
    """
    since_s = time.monotonic() - _result_printed_s[-1] if _result_printed_s else math.inf
    if since_s > -math.inf:
        return since_s < _DEAF_S
    return bool(select.select([], [1], [], 0)[1])


def _interrupted() -> ConversionInterrupted:
    return ConversionInterrupted("interrupted", next_step="Run the same command again.")


def _end(error: NvfpPrepError) -> NoReturn:
    """Print the line of an error and return its exit code, with nothing left to import or clean up."""
    _forget_unread_result()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        if "--json" in sys.argv:
            os.write(1, json.dumps(framed(error.to_dict())).encode() + b"\n")
    with contextlib.suppress(OSError):
        os.write(2, f"error: {error}\n".encode())
    os._exit(error.exit_code)


def _show_what_cannot_be_encoded() -> None:
    """Escape characters that the terminal's encoding lacks, in help and progress too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _forget_unwritten_log() -> None:
    """Discard what stderr did not take (a log on a full disk); else Python's own shutdown makes it exit code 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _keep_standard_descriptors() -> None:
    """Open /dev/null for a closed stdin, stdout or stderr: no file that is opened later may take its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")
