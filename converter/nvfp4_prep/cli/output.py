"""Output of the commands: results on stdout, the rest on stderr, errors as one line, exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from nvfp4_prep._util.printable import printable, printable_text
from nvfp4_prep._util.progress import Progress, choose_progress
from nvfp4_prep._util.system import open_files_error
from nvfp4_prep.checkpoint.filenames import JOURNAL, WORK_FOLDER
from nvfp4_prep.cli.colour import coloured, wants_colour
from nvfp4_prep.cli.frame import framed
from nvfp4_prep.cli.json_output import command_name, to_json
from nvfp4_prep.errors import ConversionInterrupted, NoSpaceError, NvfpPrepError, VerificationError
from nvfp4_prep.hub.address import parse_address

__all__ = [
    "command_line",
    "hint",
    "make_progress",
    "on_result",
    "report_errors",
    "say",
    "say_json",
    "say_next",
    "say_not_restarted",
    "say_text",
    "shell_line",
    "stdout_failed",
    "tell_address",
    "tell_leftovers",
]

_OPTION = re.compile("--[a-z-]+")
_result_hooks: list[Callable[[bool], None]] = []


@contextlib.contextmanager
def report_errors(as_json: bool) -> Iterator[None]:
    """Print errors as one line on stderr (with ``--json`` an object on stdout too) and exit with their kind's code."""
    try:
        yield
    except ConversionInterrupted as error:
        _ignore_signals()
        _fail(error, as_json=as_json)
    except NvfpPrepError as error:
        _fail(error, as_json=as_json)
    except KeyboardInterrupt:
        _ignore_signals()
        again = "Run the same command again."
        _fail(ConversionInterrupted("interrupted", next_step=again), as_json=as_json)
    except ImportError as error:
        if (none_left := open_files_error(error)) is not None:
            _fail(none_left, as_json=as_json)
        broken = NvfpPrepError(f"cannot work here: {error}", next_step="nvfp4-prep doctor says what is missing.")
        _fail(broken, as_json=as_json)
    except OSError as error:
        _fail(_unforeseen(error), as_json=as_json)
    except (MemoryError, RecursionError, RuntimeError) as error:
        exhausted = _exhausted(error)
        if exhausted is None:
            raise
        _fail(exhausted, as_json=as_json)


def _exhausted(error: MemoryError | RuntimeError) -> NvfpPrepError | None:
    """Return what to say where memory or the stack ran out; None for a mistake in this program."""
    if isinstance(error, RecursionError):
        return NvfpPrepError("something is nested too deep to be read", next_step="Look at its configs and folders.")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's is a RuntimeError
        next_step = "Give it more (ulimit -v, the container's limit), or try fewer --threads and less --memory."
        return NvfpPrepError("no memory is left", next_step=next_step)
    return None


@contextlib.contextmanager
def tell_leftovers(target: Path) -> Iterator[None]:
    """Add what is left in the target to an error about damaged input."""
    try:
        yield
    except VerificationError as error:
        if (target / WORK_FOLDER / JOURNAL).exists():
            left = f"{target} holds what was written until then, without a config; remove it if you give up."
            error.next_step = f"{error.next_step or ''} {left}".strip()
        raise


def _ignore_signals() -> None:
    """Ignore further signals: all is cleaned up, and they could only break the message or Python's own end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _unforeseen(error: OSError) -> NvfpPrepError:
    """Return the error for what the operating system refused where no module expected it."""
    if (none_left := open_files_error(error)) is not None:
        return none_left  # the file that could not be opened is often not the user's
    kind, next_step = NvfpPrepError, None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind, next_step = NoSpaceError, "Free disk space and run the command again."
    elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
        next_step = "Check the permissions, or give another path."
    where = None if error.filename is None else os.fsdecode(error.filename)
    return kind(error.strerror or str(error), where=where, next_step=next_step)


def _fail(error: NvfpPrepError, *, as_json: bool) -> NoReturn:
    if as_json:
        with contextlib.suppress(NvfpPrepError):  # the exit code and stderr still say what happened
            say_json(error.to_dict())
    hint(f"error: {error}")
    _tell_result_hooks(True)
    sys.exit(error.exit_code)


def say(text: str) -> None:
    """Print one line of a result on stdout, made printable. A reader that has gone (``| head``) changes neither the
    work nor the exit code.

    Raises:
        NvfpPrepError: if stdout takes nothing for another reason.
    """
    say_text(printable(text))


def say_text(text: str) -> None:
    """Print a result of several lines that ``join_lines`` made; otherwise as :func:`say`."""
    _tell_result_hooks(False)
    try:
        _echo(printable_text(text), err=False)
    except OSError as error:
        stdout_failed(error)
    _tell_result_hooks(True)


def say_json(value: Mapping[str, Any]) -> None:
    """Print the result of ``--json``: one line, in the frame that all commands share."""
    say(to_json(framed(value, command_name())))


def _tell_result_hooks(printed: bool) -> None:
    for hook in _result_hooks:
        hook(printed)


def on_result(hook: Callable[[bool], None]) -> None:
    """Have ``hook`` called with False before and with True after a result or an error is printed: the work is over."""
    _result_hooks.append(hook)


def _echo(text: str, *, err: bool) -> None:
    """Print on a stream whatever its encoding: what it lacks becomes an escape, so that no success ends in an error."""
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = text.encode(encoding, "backslashreplace").decode(encoding)
    click.echo(coloured(shown) if wants_colour(stream) else shown, err=err)


def stdout_failed(error: OSError) -> None:
    """Send what is left to nowhere, or Python's own end fails once more. Raises as :func:`say`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        error.filename = "stdout"
        raise _unforeseen(error) from error


def hint(text: str) -> None:
    """Print anything else as one line on stderr, made printable; a stderr that takes nothing breaks no work."""
    with contextlib.suppress(OSError):
        _echo(printable(text), err=True)


def say_not_restarted(target: object, *, restart: bool, finished: bool) -> None:
    """Say that ``--restart`` did nothing: it discards an unfinished run, never a finished output."""
    if restart and finished:
        hint(f"{target} is finished, so --restart discarded nothing. To write it anew, remove the directory first.")


def shell_line(*words: object) -> str:
    """Return a command of ours as one types it, whatever is in the paths."""
    texts = [text if _OPTION.fullmatch(text) or text[:1] != "-" else f"./{text}" for text in map(str, words)]
    return " ".join(["nvfp4-prep", *map(_quoted, texts)])


def command_line() -> str:
    """Return what was typed, as a report cites it."""
    return " ".join(["nvfp4-prep", *map(_quoted, sys.argv[1:])])


def _quoted(word: str) -> str:
    """Quote a word for a shell; one that cannot be shown becomes bash's ``$'...'``."""
    if printable(word) == word:
        return shlex.quote(word)
    shown = (chr(byte) if 0x20 <= byte < 0x7F and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(word))
    return f"$'{''.join(shown)}'"


def say_next(*words: object) -> None:
    """Print the command that comes next, on stderr."""
    hint(f"next: {shell_line(*words)}")


def tell_address(text: str, *, quiet: bool) -> None:
    """Say it where a name that looks like a path is going to be looked up on the Hub."""
    if not quiet and not text.startswith("hf://") and parse_address(text) is not None:
        hint(f"{text} is not a local path: looking for it on the Hugging Face Hub")


def make_progress(quiet: bool) -> Progress:
    """Return a bar, log lines or nothing, whatever fits stderr."""
    return choose_progress(quiet=quiet)
