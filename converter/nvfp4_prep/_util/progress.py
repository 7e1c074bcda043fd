"""Progress on stderr: a live line on a terminal, a log line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, Protocol, TextIO

from nvfp4_prep._util.text import format_duration, format_nbytes

__all__ = ["LogProgress", "NoProgress", "Progress", "TerminalProgress", "choose_progress"]


class Progress(Protocol):
    """Told how a job of known size goes on. Called from several threads."""

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """A job begins; ``done_nbytes`` of it were done by an earlier run."""
        ...

    def advance(self, nbytes: int, label: str) -> None:
        """``nbytes`` more are done; ``label`` says where."""
        ...

    def close(self) -> None:
        """The job ended, well or not."""
        ...


class NoProgress:
    """Says nothing."""

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """Nothing."""

    def advance(self, nbytes: int, label: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TerminalProgress:
    """A tqdm bar: bytes, rate, time left, current file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """See :class:`Progress`."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_nbytes,
            initial=done_nbytes,
            desc=title,
            unit="B",
            unit_scale=True,
            file=self._stream,
            dynamic_ncols=True,
        )

    def advance(self, nbytes: int, label: str) -> None:
        """See :class:`Progress`."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_postfix_str(label, refresh=False)
                self._bar.update(nbytes)

    def close(self) -> None:
        """See :class:`Progress`."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None


class LogProgress:
    """One line at the start, every ``interval_s`` seconds, and at the end."""

    def __init__(self, stream: TextIO, interval_s: float = 30.0) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._title = ""
        self._total = self._done = self._begin_done = 0
        self._begin = self._last = 0.0

    def start(self, title: str, total_nbytes: int, done_nbytes: int = 0) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._title, self._total = title, total_nbytes
            self._done = self._begin_done = done_nbytes
            self._begin = self._last = time.monotonic()
            resumed = f", {format_nbytes(done_nbytes)} done before" if done_nbytes else ""
            print(f"{title}: {format_nbytes(total_nbytes)}{resumed}", file=self._stream, flush=True)

    def advance(self, nbytes: int, label: str) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._last < self._interval_s:
                return
            self._last = now
            rate = (self._done - self._begin_done) / max(now - self._begin, 1e-9)
            left = format_duration((self._total - self._done) / rate) if rate else "?"
            print(
                f"{self._title}: {format_nbytes(self._done)} of {format_nbytes(self._total)}"
                f" ({100 * self._done / max(self._total, 1):.0f} %), {rate / 1e9:.2f} GB/s, {left} left, {label}",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """See :class:`Progress`."""
        with self._lock:
            if self._total and self._done >= self._total:
                seconds = max(time.monotonic() - self._begin, 1e-9)
                rate = (self._done - self._begin_done) / seconds / 1e9
                print(
                    f"{self._title}: done in {format_duration(seconds)}, {rate:.2f} GB/s", file=self._stream, flush=True
                )
            self._total = 0


def choose_progress(*, quiet: bool) -> Progress:
    """The right one for stderr as it is."""
    if quiet:
        return NoProgress()
    return TerminalProgress(sys.stderr) if sys.stderr.isatty() else LogProgress(sys.stderr)
