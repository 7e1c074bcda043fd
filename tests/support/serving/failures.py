"""Failures of one rank while servers load."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any
from unittest import mock


def _die(*_args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse_to_read(*_args: Any) -> int:
    raise OSError(5, "Input/output error")


FAILURES = {
    "killed before it exchanges": ("nvfp4_prep.load.group_loader.GroupLoader.finish", _die),
    "cannot read": ("nvfp4_prep.load.reader.os.preadv", _refuse_to_read),
    "fails before it exchanges": ("nvfp4_prep.serving.expert_files.read_header", _refuse_to_read),
}
"""What is put in the place of what."""


def failing(how: str) -> contextlib.AbstractContextManager[Any]:
    """While it is entered, this process fails in one of the ways of :data:`FAILURES`; not for an empty name."""
    return mock.patch(*FAILURES[how]) if how else contextlib.nullcontext()
