"""Progress of a long load as log lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["RateLog"]


class RateLog:
    """Called with numbers of bytes from several threads; every ``every_s`` seconds it says how far and how fast."""

    def __init__(self, say: Callable[[str], None], *, every_s: float = 10.0) -> None:
        self._say = say
        self._every_s = every_s
        self._lock = threading.Lock()
        self._begun: float | None = None
        self._said = 0.0
        self._nbytes = 0

    def __call__(self, nbytes: int) -> None:
        """``nbytes`` more have been handed on."""
        with self._lock:
            now = time.monotonic()
            if self._begun is None:
                self._begun = self._said = now
            self._nbytes += nbytes
            if now - self._said < self._every_s:
                return
            self._said = now
            rate = self._nbytes / (now - self._begun) / 1e9
            text = f"{self._nbytes / 1e9:.1f} GB of prepared experts loaded, {rate:.1f} GB/s"
        self._say(text)
