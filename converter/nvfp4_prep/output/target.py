"""The directory that a command writes: lock, journal, resume, and files that appear only when they are whole.

Life of a file: written in a folder of this process in ``.nvfp4_prep/``, flushed to disk, noted in the journal, renamed
into place. So a file under its final name is complete, and one that the journal does not know is not ours.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nvfp4_prep._util.text import format_nbytes
from nvfp4_prep.checkpoint.filenames import CONFIG, JOURNAL, MANIFEST, WORK_FOLDER, is_safe_name
from nvfp4_prep.errors import NoSpaceError, TargetError
from nvfp4_prep.output.atomic_file import AtomicFile, free_nbytes, translate_os_error
from nvfp4_prep.output.journal import check_identity, finished_files, named_files, read_lines
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.target_lock import LOCK, check_idle, check_locks, take_lock
from nvfp4_prep.output.target_root import TargetRoot, check_work_folder

__all__ = ["LOCK", "PARTS_FOLDER", "SOURCE_FOLDER", "Target", "check_names", "check_space"]

LAST_FILES = (CONFIG, MANIFEST)
"""Without these a directory is no checkpoint: every command writes them last."""
SOURCE_FOLDER = "source"
"""In the work folder: shards that a source downloads; the source itself looks after it."""
PARTS_FOLDER = "parts"
"""In the work folder: targets of their own, one for each part of a conversion by several machines."""
_JOURNAL = f"{WORK_FOLDER}/{JOURNAL}"


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
        need_sha256: bool = True,
    ) -> None:
        """Prepare the directory for one job.

        Args:
            path: the directory; made if it does not exist.
            identity: JSON value that says what will be written from what; a resumed run must have the same.
            restart: forget an earlier unfinished run.
            elsewhere: whether a finished file of this name, size and sha256 was taken away from here on purpose.
            need_sha256: whether a finished file without its sha256 in the journal is made again.

        Raises:
            TargetError: not empty and not ours, or not writable.
            BusyError: another run holds it.
            ResumeConflictError: it holds an unfinished run with another identity.
        """
        self.path = path
        self.work = path / WORK_FOLDER
        self.done: dict[str, JournalEntry] = {}
        self._identity = json.loads(json.dumps(identity))
        self._elsewhere = elsewhere
        self._need_sha256 = need_sha256
        self._note_lock = threading.Lock()
        self._seen: dict[str, os.stat_result] = {}  # the files that this run wrote or found
        self._ours: set[str] = set()  # names that an earlier run gave to files which must be written again
        self.check_ours(path)
        check_locks(path)
        self._made = [folder for folder in (self.work, *self.work.parents) if not folder.exists()]
        try:
            self._root = TargetRoot(path, make=True)
            self._lock = self._open_work_folder()
        except OSError as error:
            raise translate_os_error(error, self.work) from error
        try:
            self.check_ours(path)  # again: another run may have finished before this one had the lock
            if restart:
                self._forget()
            self.resumed = self._read_journal()
        except BaseException:
            self._close()
            raise

    def _open_work_folder(self) -> int:
        try:
            self._root.make_folder(WORK_FOLDER)
            return take_lock(self._root)
        except BaseException as error:
            self._root.close()
            if isinstance(error, TargetError):  # no locks here: nothing is left
                with contextlib.suppress(OSError):
                    for folder in self._made:
                        folder.rmdir()
            raise

    def _close(self) -> None:
        os.close(self._lock)
        self._root.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.resumed and not self.done:
            with contextlib.suppress(OSError):
                self._leave_nothing()
        self._close()

    def _leave_nothing(self) -> None:
        """Take back the claim of a run that wrote no file, and the directories that it made; while it has the lock."""
        self._root.remove_tree(self._writing)
        if set(self._root.names(WORK_FOLDER)) != {LOCK, JOURNAL}:
            return  # downloads, or parts
        if [entry.name for entry in self.path.iterdir()] != [WORK_FOLDER]:
            return
        for name in (JOURNAL, LOCK):
            self._root.unlink(f"{WORK_FOLDER}/{name}")
        self.work.rmdir()
        for folder in self._made[1:]:
            folder.rmdir()

    @property
    def _writing(self) -> str:
        # where the file system has no locks across machines, two of them still never write one file
        return f"{WORK_FOLDER}/writing-{socket.gethostname()}-{os.getpid()}"

    @staticmethod
    def has_journal(path: Path) -> bool:
        """Return whether the directory itself (not a part in it) has been worked on and is not finished."""
        return os.path.lexists(path / WORK_FOLDER / JOURNAL)

    @staticmethod
    def check_ours(path: Path) -> None:
        """Raise :class:`TargetError` if the directory is neither new, empty nor one that we work in."""
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
        """Raise :class:`BusyError` if a run holds the directory; only looks."""
        check_idle(path)

    @staticmethod
    def remove_finished_work(path: Path) -> None:
        """Remove what a run that was stopped in its very last steps left beside a finished output.

        Raises:
            TargetError: if it cannot be removed, or has a journal: then nothing is finished.
        """
        if not os.path.lexists(path / WORK_FOLDER):
            return
        check_work_folder(path / WORK_FOLDER, (LOCK,), (SOURCE_FOLDER, PARTS_FOLDER))
        try:
            with TargetRoot(path) as root:
                if root.status(_JOURNAL) is None:
                    root.remove_tree(WORK_FOLDER)
                    root.sync()
        except OSError as error:
            raise translate_os_error(error, path / WORK_FOLDER) from error

    def _forget(self) -> None:
        try:
            lines = read_lines(self._root)
            for name in (*LAST_FILES, *named_files(lines)):  # first the files that vouch for the others
                self._root.unlink(name)
        except OSError as error:
            raise translate_os_error(error, self.path) from error
        self._empty_journal()

    def _empty_journal(self) -> None:
        """Emptied, never removed: what lies beside a work folder without a journal is not ours."""
        try:
            descriptor = self._root.open_file(_JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with contextlib.closing(os.fdopen(descriptor, "wb")):
                os.fsync(descriptor)
            self._root.sync(WORK_FOLDER)  # a power cut must not leave files without their journal
            self._root.sync()
        except OSError as error:
            raise translate_os_error(error, self.work) from error

    def _read_journal(self) -> bool:
        try:
            for leftover in self._root.names(WORK_FOLDER):
                if leftover not in (LOCK, JOURNAL, SOURCE_FOLDER, PARTS_FOLDER):
                    self._root.remove_tree(f"{WORK_FOLDER}/{leftover}")
            lines = read_lines(self._root)
            if not lines:
                self._empty_journal()
                self.note({"identity": self._identity})
                return False
            check_identity(self.path, lines[0].get("identity"), self._identity)
            self._repair_tail()
            self.done = finished_files(self._root, lines, self._elsewhere, need_sha256=self._need_sha256)
            for name in named_files(lines):
                status = self._root.status(name)
                if status is not None and name in self.done:
                    self._seen[name] = status
                elif status is not None and stat.S_ISREG(status.st_mode):
                    self._ours.add(name)
        except OSError as error:
            raise translate_os_error(error, self.work) from error
        return True

    def _repair_tail(self) -> None:
        """Cut off a last line that a kill left unfinished, so that the next one starts on its own."""
        with os.fdopen(self._root.open_file(_JOURNAL, os.O_RDWR), "r+b") as stream:
            text = stream.read()
            if not text.endswith(b"\n"):
                stream.truncate(text.rfind(b"\n") + 1)
                os.fsync(stream.fileno())

    def note(self, entry: Mapping[str, Any] | JournalEntry) -> None:
        """Append one line to the journal and flush it to disk."""
        line = asdict(entry) if isinstance(entry, JournalEntry) else entry
        with self._note_lock:
            try:
                descriptor = self._root.open_file(_JOURNAL, os.O_WRONLY | os.O_APPEND)
                with os.fdopen(descriptor, "ab") as stream:
                    stream.write(json.dumps(line, sort_keys=True).encode() + b"\n")
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise translate_os_error(error, self.work) from error
            finished = JournalEntry.parse(line)
            if finished is not None:
                self.done[finished.file] = finished

    def check_names(self, expected: Iterable[str]) -> None:
        """Raise :class:`TargetError` if the directory holds a file that this run neither wrote nor will write."""
        # what this run will write and an earlier one did not begin with is somebody else's
        begun = {*self.done, *self._ours}
        foreign = [name for name in expected if name not in begun and self._root.status(name) is not None]
        if foreign:
            raise _foreign(self.path / min(foreign))
        check_names(self.path, begun)

    def check_space(self, needed_nbytes: int) -> None:
        """Raise :class:`NoSpaceError` if the file system has less room than that (:attr:`Room.needed_nbytes`)."""
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
        temporary = f"{self._writing}/{name}"

        def place(entry: Mapping[str, Any] | None, status: os.stat_result) -> None:
            # Noted first: a file that has its name and that the journal does not know is not ours.
            self.note({"made": name} if entry is None else {"file": name, "nbytes": nbytes, **entry})
            self._move(temporary, name, status)

        return AtomicFile(self._root, temporary, nbytes, place)

    def _move(self, old: str, name: str, status: os.stat_result, root: TargetRoot | None = None) -> None:
        now, seen = self._root.status(name), self._seen.get(name)
        own = name in self._ours or (seen is not None and _difference(seen, now) is None)
        try:
            self._root.move(old, name, replace=own, root=root)
        except FileExistsError as error:
            raise TargetError(
                "would replace a file that another program put there while this run worked",
                where=str(self.path / name),
                next_step="Move it out of the target and run the same command again: finished files are kept.",
            ) from error
        self._seen[name] = status
        self._ours.discard(name)

    def adopt(self, entry: JournalEntry, other: Target) -> None:
        """Take over a file that another target on this file system finished, with its journal entry."""
        status = other._root.status(entry.file)
        try:
            if status is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self.note(entry)
            self._move(entry.file, entry.file, status, other._root)
        except OSError as error:
            raise translate_os_error(error, self.path / entry.file) from error

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file whole; the journal has its name only, so a resumed run writes it again."""
        file = self.create(name, len(data))
        file.write(0, data)
        file.commit(None)

    def remove_file(self, name: str) -> None:
        """Remove a file of an earlier run that :meth:`write_file` will write again."""
        if name in self._ours:
            self._root.unlink(name)
            self._ours.discard(name)

    def check_files(self) -> None:
        """Look at all finished files again.

        Raises:
            TargetError: if one is missing or is not the file any more that this run wrote or found.
        """
        for name in sorted({*self.done, *self._seen}):
            entry, seen, now = self.done.get(name), self._seen.get(name), self._root.status(name)
            if now is None and entry is not None and self._elsewhere(name, entry.nbytes, entry.sha256):
                continue
            actual = _difference(seen, now)
            if actual is not None:
                raise TargetError(
                    "a finished file was changed or removed by another program while this run worked",
                    where=str(self.path / name),
                    expected="the file that was written" if seen is None else f"{seen.st_size} bytes",
                    actual=actual,
                    next_step="Remove that file if it is there and run the same command again: it is made anew.",
                )

    def finish(self) -> None:
        """Remove journal and work folder: the directory is a finished output now.

        The journal goes first and at once: files beside a work folder without a journal are a finished output, so a
        kill in between leaves nothing that another run would take for its own. The same command finds the output
        finished and removes the rest (:meth:`remove_finished_work`).
        """
        try:
            self._root.unlink(_JOURNAL)
            self._root.sync(WORK_FOLDER)
            self._root.remove_tree(WORK_FOLDER)
            self._root.sync()
        except OSError as error:
            raise translate_os_error(error, self.work) from error


def _difference(seen: os.stat_result | None, now: os.stat_result | None) -> str | None:
    """What became of a file, ``None`` if it is the same."""
    if now is None:
        return "nothing"
    if not stat.S_ISREG(now.st_mode):
        return "another kind of file"
    if seen is None or (seen.st_dev, seen.st_ino) != (now.st_dev, now.st_ino):
        return "another file"
    return None if seen.st_size == now.st_size else f"{now.st_size} bytes"


def check_names(path: Path, known: Collection[str]) -> None:
    """Raise :class:`TargetError` if the directory holds a file outside its work folder that is not known."""
    for there in sorted(path.rglob("*")):
        name = there.relative_to(path).as_posix()
        if there.is_file() and not name.startswith(WORK_FOLDER + "/") and name not in known:
            raise _foreign(there)


def _foreign(path: Path) -> TargetError:
    return TargetError("holds a file of something else", where=str(path), next_step="Move it away and run again.")


def check_space(path: Path, needed_nbytes: int, free_there_nbytes: int) -> None:
    """Raise :class:`NoSpaceError` if more is needed than there is."""
    if needed_nbytes > free_there_nbytes:
        raise NoSpaceError(
            f"not enough space: {format_nbytes(needed_nbytes)} needed, {format_nbytes(free_there_nbytes)} free",
            where=str(path),
            next_step="Make room, or give a target on another disk.",
        )
