"""The directory that a command writes: lock, journal, resume, and files that appear only when they are whole.

Life of a file: written in a folder of this process in ``.nvfp4_prep/``, flushed to disk, noted in the journal, renamed
into place. So a file under its final name is complete, and one that the journal does not know is not ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST, WORK_FOLDER, is_safe_name
from nvfp4_prep.errors import BusyError, NoSpaceError, TargetError
from nvfp4_prep.output.atomic_file import AtomicFile, free_nbytes, move_into_place, sync_folder, translate_os_error
from nvfp4_prep.output.journal import JOURNAL, check_identity, file_entries, finished_files, read_lines
from nvfp4_prep.output.target_root import check_work_folder, unlink_inside

__all__ = ["LOCK", "PARTS_FOLDER", "SOURCE_FOLDER", "Target", "check_names", "check_space"]

LAST_FILES = (CONFIG, MANIFEST)
"""Without these a directory is no checkpoint: every command writes them last."""
LOCK = "lock"
SOURCE_FOLDER = "source"
"""In the work folder: shards that a source downloads; the source itself looks after it."""
PARTS_FOLDER = "parts"
"""In the work folder: targets of their own, one for each part of a conversion by several machines."""


class Target:
    """An output directory in work; use as a context manager.

    Attributes:
        path: the directory.
        work: its ``.nvfp4_prep`` folder.
        done: journal entries of finished files by name.
        resumed: whether an earlier run's work was found.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        elsewhere: Callable[[str, int, str | None], bool] = lambda name, nbytes, sha256: False,
    ) -> None:
        """Prepares the directory for one job.

        Args:
            path: the directory; made if it does not exist.
            identity: JSON value that says what will be written from what; a resumed run must have the same.
            restart: forget an earlier unfinished run.
            elsewhere: whether a finished file of this name, size and sha256 was taken away from here on purpose.

        Raises:
            TargetError: not empty and not ours, or not writable.
            BusyError: another run holds it.
            ResumeConflictError: it holds an unfinished run with another identity.
        """
        self.path = path
        self.work = path / WORK_FOLDER
        self.done: dict[str, dict[str, Any]] = {}
        self._identity = json.loads(json.dumps(identity))
        self._elsewhere = elsewhere
        self._note_lock = threading.Lock()
        self.check_ours(path)
        self._made = [folder for folder in (self.work, *self.work.parents) if not folder.exists()]
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise translate_os_error(error, self.work) from error
        try:
            self.check_ours(path)  # again: another run may have finished before this one had the lock
            if restart:
                self._forget()
            self.resumed = self._read_journal()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.resumed and not self.done:
            with contextlib.suppress(OSError):
                self._leave_nothing()
        os.close(self._lock)

    def _leave_nothing(self) -> None:
        """Takes back the claim of a run that wrote no file, and the directories that it made; while it has the lock."""
        shutil.rmtree(self._writing, ignore_errors=True)
        if {entry.name for entry in self.work.iterdir()} != {LOCK, JOURNAL}:
            return  # downloads, or parts
        if [entry.name for entry in self.path.iterdir()] != [WORK_FOLDER]:
            return
        for name in (JOURNAL, LOCK):
            (self.work / name).unlink()
        self.work.rmdir()
        for folder in self._made[1:]:
            folder.rmdir()

    @property
    def _writing(self) -> Path:
        # where the file system has no locks across machines, two of them still never write one file
        return self.work / f"writing-{socket.gethostname()}-{os.getpid()}"

    @staticmethod
    def has_journal(path: Path) -> bool:
        """Whether the directory itself (not a part in it) has been worked on and is not finished."""
        return (path / WORK_FOLDER / JOURNAL).exists()

    @staticmethod
    def check_ours(path: Path) -> None:
        """Raises :class:`TargetError` if the directory is neither new, empty nor one that we work in."""
        if not path.exists():
            return
        if not path.is_dir():
            raise TargetError("is no directory", where=str(path), next_step="Give another target.")
        check_work_folder(path / WORK_FOLDER, (LOCK, JOURNAL), (SOURCE_FOLDER, PARTS_FOLDER))
        try:
            foreign = next((entry.name for entry in os.scandir(path) if entry.name != WORK_FOLDER), None)
        except OSError as error:
            raise translate_os_error(error, path) from error
        if foreign is not None and not Target.has_journal(path):
            raise TargetError(
                f"exists and is not empty (it has {foreign!r})",
                where=str(path),
                next_step="Give another target, or empty it yourself: nvfp4-prep never overwrites.",
            )

    @staticmethod
    def check_idle(path: Path) -> None:
        """Raises :class:`BusyError` if a run holds the directory; only looks."""
        try:
            descriptor = os.open(path / WORK_FOLDER / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(path) from error
        finally:
            os.close(descriptor)

    def _take_lock(self) -> int:
        descriptor = os.open(self.work / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise _busy(self.path) from error
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            raise BusyError("another run has just finished this target", where=str(self.path), next_step="Look at it.")
        return descriptor

    def _forget(self) -> None:
        for name in LAST_FILES:  # before the files that they vouch for
            unlink_inside(self.path, name)
        for entry in file_entries(read_lines(self.work)):
            unlink_inside(self.path, entry["file"])
        self._empty_journal()

    def _empty_journal(self) -> None:
        """Emptied, never removed: it makes an earlier run's index and card ours, which it does not name."""
        try:
            with (self.work / JOURNAL).open("wb") as stream:
                os.fsync(stream.fileno())
            sync_folder(self.work)  # a power cut must not leave files without their journal
            sync_folder(self.path)
        except OSError as error:
            raise translate_os_error(error, self.work) from error

    def _read_journal(self) -> bool:
        for leftover in self.work.iterdir():
            if leftover.name not in (LOCK, JOURNAL, SOURCE_FOLDER, PARTS_FOLDER):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        lines = read_lines(self.work)
        if not lines:
            self._empty_journal()
            self.note({"identity": self._identity})
            return False
        check_identity(self.path, lines[0].get("identity"), self._identity)
        self._repair_tail()
        self.done = finished_files(self.path, lines, self._elsewhere)
        return True

    def _repair_tail(self) -> None:
        """Cuts off a last line that a kill left unfinished, so that the next one starts on its own."""
        path = self.work / JOURNAL
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            with path.open("r+b") as stream:
                stream.truncate(text.rfind(b"\n") + 1)
                os.fsync(stream.fileno())

    def note(self, entry: Mapping[str, Any]) -> None:
        """Appends one line to the journal and flushes it to disk."""
        with self._note_lock:
            try:
                with (self.work / JOURNAL).open("ab") as stream:
                    stream.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise translate_os_error(error, self.work) from error
            if "file" in entry:
                self.done[str(entry["file"])] = dict(entry)

    def check_names(self, expected: Iterable[str]) -> None:
        """Raises :class:`TargetError` if the directory holds a file that this run neither wrote nor will write."""
        check_names(self.path, {*expected, *self.done})

    def check_space(self, needed_nbytes: int) -> None:
        """Raises :class:`NoSpaceError` if the file system has less room than that (:attr:`Room.needed_nbytes`)."""
        check_space(self.path, needed_nbytes, free_nbytes(self.path))

    def create(self, name: str, nbytes: int) -> AtomicFile:
        """Create a file at its temporary place, with its space allocated.

        Raises:
            TargetError: if the name would lead out of the directory or into its work folder.
        """
        if not is_safe_name(name) or name.split("/")[0] == WORK_FOLDER:
            raise TargetError(
                f"unsafe output file name {name!r}",
                where=str(self.path),
                expected="a relative path inside the target",
                next_step="The name comes from the input checkpoint: do not trust that checkpoint.",
            )
        return AtomicFile(
            self._writing / name,
            self.path / name,
            nbytes,
            lambda entry: self.note({"file": name, "nbytes": nbytes, **entry}),
        )

    def adopt(self, entry: Mapping[str, Any], path: Path) -> None:
        """Takes over a file that another target on this file system finished, with its journal entry."""
        self.note(entry)
        final = self.path / str(entry["file"])
        try:
            move_into_place(path, final)
        except OSError as error:
            raise translate_os_error(error, final) from error

    def write_file(self, name: str, data: bytes) -> None:
        """Writes a small file whole; not noted in the journal, so a resumed run writes it again."""
        file = self.create(name, len(data))
        file.write(0, data)
        file.commit(None)

    def finish(self) -> None:
        """Removes journal and work folder: the directory is a finished output now.

        The journal goes first and at once: files beside a work folder without a journal are a finished output, so a
        kill in between leaves nothing that another run would take for its own.
        """
        try:
            (self.work / JOURNAL).unlink(missing_ok=True)
            sync_folder(self.work)
            shutil.rmtree(self.work)
            sync_folder(self.path)
        except OSError as error:
            raise translate_os_error(error, self.work) from error


def check_names(path: Path, known: Collection[str]) -> None:
    """Raises :class:`TargetError` if the directory holds a file outside its work folder that is not known."""
    for there in sorted(path.rglob("*")):
        name = there.relative_to(path).as_posix()
        if there.is_file() and not name.startswith(WORK_FOLDER + "/") and name not in known:
            raise TargetError(
                "holds a file of something else", where=str(there), next_step="Move it away and run again."
            )


def check_space(path: Path, needed_nbytes: int, free_there_nbytes: int) -> None:
    """Raises :class:`NoSpaceError` if more is needed than there is."""
    if needed_nbytes > free_there_nbytes:
        raise NoSpaceError(
            f"not enough space: {format_nbytes(needed_nbytes)} needed, {format_nbytes(free_there_nbytes)} free",
            where=str(path),
            next_step="Make room, or give a target on another disk.",
        )


def _busy(path: Path) -> BusyError:
    return BusyError("another run writes to this target", where=str(path), next_step="Wait for it, or stop it.")
