"""Progress: a bar on a terminal or in a notebook, log lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from nvfp4_prep._util.arguments import FLAG, checked
from nvfp4_prep._util.printable import printable
from nvfp4_prep._util.text import format_duration, format_nbytes

__all__ = ["BarProgress", "LogProgress", "NoProgress", "Progress", "RateLog", "choose_progress", "default_progress"]


_LABEL_COLUMNS = 20


class Progress(Protocol):
    """Receiver of the progress of a job of known size. Methods are called from several threads."""

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """Begin a job, of which an earlier run did ``done_nbytes``."""
        ...

    def advance(self, nbytes: int, label: str) -> None:
        """Count ``nbytes`` more as done; ``label`` says where."""
        ...

    def close(self) -> None:
        """End the job, well or not."""
        ...


class NoProgress:
    """Progress that shows nothing."""

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """Do nothing."""

    def advance(self, nbytes: int, label: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _HarmlessStream:
    """A stream whose failures are not seen. tqdm writes while it holds a lock of the whole process, and an error on the
    way keeps that lock for ever: the next bar in another thread, ours or the Hub client's, would wait without end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or not."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class BarProgress:
    """A tqdm bar: bytes, rate, time left, current file. In a notebook it is the notebook's own.

    A stream that fails (a terminal that was closed) does not end the work.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """See :class:`Progress`."""
        from tqdm.auto import tqdm  # looks for a notebook when it is imported; most commands show no bar

        with contextlib.suppress(OSError):
            self._bar = tqdm(
                total=total_nbytes,
                initial=done_nbytes,
                desc=printable(title),
                unit="B",
                unit_scale=True,
                file=_HarmlessStream(self._stream),
                dynamic_ncols=True,
            )

    def advance(self, nbytes: int, label: str) -> None:
        """See :class:`Progress`."""
        with self._lock, contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.set_postfix_str(_shortened(printable(label)), refresh=False)
                self._bar.update(nbytes)

    def close(self) -> None:
        """See :class:`Progress`."""
        with self._lock, contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()
                self._bar = None


def _shortened(label: str) -> str:
    """Return a label that leaves the bar room on 80 columns: its beginning and its end."""
    return label if len(label) <= _LABEL_COLUMNS else f"{label[:7]}…{label[8 - _LABEL_COLUMNS :]}"


class _Rate:
    """Bytes over time since the first of them, and when the next line is due. Not thread-safe."""

    def __init__(self, interval_s: float, done_nbytes: int = 0) -> None:
        self.done_nbytes = done_nbytes
        self._interval_s = interval_s
        self._begin_nbytes = done_nbytes
        self._begin_s = self._last_s = time.monotonic()

    def advance(self, nbytes: int) -> bool:
        """Count bytes; return whether a line is due."""
        self.done_nbytes += nbytes
        now_s = time.monotonic()
        if now_s - self._last_s < self._interval_s:
            return False
        self._last_s = now_s
        return True

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return max(time.monotonic() - self._begin_s, 1e-9)

    @property
    def nbytes_per_s(self) -> float:
        """Rate of this run: what was done before does not count."""
        return (self.done_nbytes - self._begin_nbytes) / self.seconds


class LogProgress:
    """One line at the start, every ``interval_s`` seconds, and at the end; for logs and pipes.

    A stream that fails (a log on a full disk) does not end the work.
    """

    def __init__(self, stream: TextIO, interval_s: float = 30.0) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._title = ""
        self._total_nbytes = 0
        self._rate = _Rate(interval_s)

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._title, self._total_nbytes = title, total_nbytes
            self._rate = _Rate(self._interval_s, done_nbytes)
            resumed = f", {format_nbytes(done_nbytes)} done before" if done_nbytes else ""
            self._print(f"{title}: {format_nbytes(total_nbytes)}{resumed}")

    def advance(self, nbytes: int, label: str) -> None:
        """See :class:`Progress`."""
        with self._lock:
            if not self._rate.advance(nbytes):
                return
            done, total, speed = self._rate.done_nbytes, self._total_nbytes, self._rate.nbytes_per_s
            left = format_duration((total - done) / speed) if speed else "?"
            self._print(
                f"{self._title}: {format_nbytes(done)} of {format_nbytes(total)} ({100 * done / max(total, 1):.0f} %),"
                f" {speed / 1e9:.2f} GB/s, {left} left, {label}"
            )

    def close(self) -> None:
        """See :class:`Progress`."""
        with self._lock:
            if self._total_nbytes and self._rate.done_nbytes >= self._total_nbytes:
                speed = self._rate.nbytes_per_s / 1e9
                self._print(f"{self._title}: done in {format_duration(self._rate.seconds)}, {speed:.2f} GB/s")
            self._total_nbytes = 0

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(printable(text), file=self._stream, flush=True)


class RateLog:
    """Log lines of a load whose size is not known beforehand: called with numbers of bytes from several threads."""

    def __init__(self, say: Callable[[str], None], *, every_s: float = 10.0) -> None:
        self._say = say
        self._every_s = every_s
        self._lock = threading.Lock()
        self._rate: _Rate | None = None

    def __call__(self, nbytes: int) -> None:
        """Count ``nbytes`` more that have been handed on."""
        with self._lock:
            if self._rate is None:  # time begins with the first bytes, not with the model's construction
                self._rate = _Rate(self._every_s)
            if not self._rate.advance(nbytes):
                return
            text = (
                f"{self._rate.done_nbytes / 1e9:.1f} GB of prepared experts loaded,"
                f" {self._rate.nbytes_per_s / 1e9:.1f} GB/s"
            )
        self._say(text)


@checked(quiet=FLAG)
def choose_progress(*, quiet: bool) -> Progress:
    """Return what fits stderr as it is: nothing if ``quiet``, a bar on a terminal or in a notebook, else log lines."""
    if quiet:
        return NoProgress()
    return BarProgress(sys.stderr) if sys.stderr.isatty() or _in_notebook() else LogProgress(sys.stderr)


def default_progress() -> Progress:
    """Return what a call from Python shows if it is told nothing: a bar in a notebook, nothing elsewhere."""
    return BarProgress(sys.stderr) if _in_notebook() else NoProgress()


def _in_notebook() -> bool:
    """Return whether an IPython kernel runs this, whose stderr is not a terminal; nothing is imported for it."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_shell() if callable(get_shell) else None
    config = getattr(shell, "config", None)  # of a stand-in for IPython, as servers' tests have, anything or nothing
    return isinstance(config, dict) and "IPKernelApp" in config
