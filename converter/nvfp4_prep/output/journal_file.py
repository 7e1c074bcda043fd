"""The journal of a run in its target's work folder: begun, mended after a kill, and written line by line."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from typing import Any

from nvfp4_prep.checkpoint.filenames import JOURNAL, WORK_FOLDER
from nvfp4_prep.output.atomic_file import translate_os_error
from nvfp4_prep.output.journal import VERDICTS_PATH
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.journal_line import to_line
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["JOURNAL_PATH", "JournalFile"]

JOURNAL_PATH = f"{WORK_FOLDER}/{JOURNAL}"


class JournalFile:
    """The journal of a target whose lock is held; threads may append at once."""

    def __init__(self, root: TargetRoot) -> None:
        self._root = root
        self._lock = threading.Lock()

    def empty(self) -> None:
        """Empty the journal; it is never removed, because files beside a work folder without one are not ours."""
        try:
            descriptor = self._root.open_file(JOURNAL_PATH, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with contextlib.closing(os.fdopen(descriptor, "wb")):
                os.fsync(descriptor)
            self._root.sync(WORK_FOLDER)  # a power cut must not leave files without their journal
            self._root.sync()
        except OSError as error:
            raise translate_os_error(error, self._root.path / WORK_FOLDER) from error

    def repair_tail(self, *, keep: bool) -> None:
        """Cut off a last line that a kill left unfinished, so that the next one starts on its own; or end it there, to
        ``keep`` it as a line that is damaged.
        """
        with os.fdopen(self._root.open_file(JOURNAL_PATH, os.O_RDWR), "r+b") as stream:
            text = stream.read()
            if text.endswith(b"\n"):
                return
            if keep:
                stream.write(b"\n")
                stream.flush()
            else:
                stream.truncate(text.rfind(b"\n") + 1)
            os.fsync(stream.fileno())

    def count_verdict(self) -> None:
        """Count one more verdict of a smoke test, beside the journal: a line that is lost whole leaves no trace there.

        To be called before the line is appended: one verdict too many costs a smoke test, one too few lets wrong files
        pass.
        """
        try:
            self._write_at_end(VERDICTS_PATH, b"1", os.O_CREAT)
            self._root.sync(WORK_FOLDER)
        except OSError as error:
            raise translate_os_error(error, self._root.path / WORK_FOLDER) from error

    def append(self, entry: Mapping[str, Any] | JournalEntry, done: dict[str, JournalEntry]) -> None:
        """Append one line and flush it to disk; a finished file is put among those that are ``done``."""
        line = entry.to_json() if isinstance(entry, JournalEntry) else entry
        with self._lock:
            try:
                self._write_at_end(JOURNAL_PATH, to_line(line))
            except OSError as error:
                raise translate_os_error(error, self._root.path / WORK_FOLDER) from error
            finished = JournalEntry.parse(line)
            if finished is not None:
                done[finished.file] = finished

    def _write_at_end(self, name: str, data: bytes, flags: int = 0) -> None:
        descriptor = self._root.open_file(name, os.O_WRONLY | os.O_APPEND | flags)
        with os.fdopen(descriptor, "ab") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
