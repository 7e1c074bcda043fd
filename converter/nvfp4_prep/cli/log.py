"""``--verbose`` and ``--log-file``: the steps of a command with their times."""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nvfp4_prep._util.printable import PrintableFormatter
from nvfp4_prep._util.steps import note
from nvfp4_prep._version import __version__
from nvfp4_prep.cli.output import command_line
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.output.log_file import open_log

__all__ = ["logging_steps"]

_PATHS = ("checkpoint", "source", "target", "directory")
"""Parameters of commands that may name a checkpoint, to which no log is added."""


_ON_STDERR = ("%(asctime)s.%(msecs)03dZ %(message)s", "%H:%M:%S")
_IN_FILE = ("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")


class _HarmlessHandler(logging.StreamHandler[Any]):
    """A handler whose stream may fail (a full disk, a closed terminal) without a word: no work ends for its log."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(OSError, ValueError):
            super().flush()


@contextmanager
def logging_steps(*, verbose: bool, path: Path | None, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Log what happens within, to stderr if ``verbose``, and to a file where one is named.

    Args:
        verbose: steps and not only warnings on stderr.
        path: the file, see :func:`~nvfp4_prep.output.log_file.open_log`.
        parameters: the command's, of which those that name a checkpoint are looked at.
    """
    if not verbose and path is None:
        yield
        return
    with ExitStack() as held:
        handlers = [_handler(sys.stderr, logging.INFO if verbose else logging.WARNING, _ON_STDERR)]
        if path is not None:
            directories = (value for name in _PATHS if isinstance(value := parameters.get(name), str | Path))
            stream = held.enter_context(_closing(open_log(path, *directories)))
            handlers.append(_handler(stream, logging.INFO, _IN_FILE))
        logger = logging.getLogger("nvfp4_prep")
        before = logger.level
        held.callback(logger.setLevel, before)
        for handler in handlers:
            logger.addHandler(handler)
            held.callback(logger.removeHandler, handler)
        logger.setLevel(logging.INFO)
        note("%s; nvfp4-prep %s on %s, Python %s", command_line(), __version__, platform.node(), sys.version.split()[0])
        yield from _noting_the_end()


def _noting_the_end() -> Iterator[None]:
    begin_s = time.monotonic()
    try:
        yield
    except NvfpPrepError as error:
        note("error: %s", error)
        note("exit code %d after %.2f s", error.exit_code, time.monotonic() - begin_s)
        raise
    except SystemExit as error:
        note("exit code %s after %.2f s", error.code or 0, time.monotonic() - begin_s)
        raise
    except BaseException as error:
        note("ended by %s after %.2f s", type(error).__name__, time.monotonic() - begin_s)
        raise
    note("exit code 0 after %.2f s", time.monotonic() - begin_s)


@contextmanager
def _closing(stream: Any) -> Iterator[Any]:
    """Close a stream at the end, whatever its disk says."""
    try:
        yield stream
    finally:
        with suppress(OSError):
            stream.close()


def _handler(stream: Any, level: int, formats: tuple[str, str]) -> logging.Handler:
    handler = _HarmlessHandler(stream)
    handler.setLevel(level)
    formatter = PrintableFormatter(*formats)
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    return handler
