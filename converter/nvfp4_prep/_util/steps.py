"""Steps of a command in its log: what began, what ended, and after how long."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["note", "step"]

_log = logging.getLogger("nvfp4_prep.steps")


@contextmanager
def step(name: str) -> Iterator[None]:
    """Log the beginning and the end of a step, with its duration, at level INFO."""
    _log.info("%s: begins", name)
    begin_s = time.monotonic()
    try:
        yield
    except BaseException as error:
        _log.info("%s: ended after %.2f s by %s", name, time.monotonic() - begin_s, type(error).__name__)
        raise
    _log.info("%s: done in %.2f s", name, time.monotonic() - begin_s)


def note(text: str, *values: object) -> None:
    """Log one fact at level INFO."""
    _log.info(text, *values)
