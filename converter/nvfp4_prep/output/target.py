"""The directory that a command writes: lock, journal, resume, and files that appear only when they are whole.

Life of a file: written in a folder of this process in ``.nvfp4_prep/``, flushed to disk, noted in the journal, renamed
into place. So a file under its final name is complete, and one that the journal does not know is not ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nvfp4_prep.checkpoint.filenames import JOURNAL, VERDICTS, WORK_FOLDER, is_safe_name
from nvfp4_prep.errors import TargetError
from nvfp4_prep.output.atomic_file import AtomicFile, free_nbytes, translate_os_error
from nvfp4_prep.output.journal import (
    LOST_VERDICT,
    VERDICTS_PATH,
    check_identity,
    due_verdicts,
    read_journal,
    wrong_verdict,
)
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.journal_file import JOURNAL_PATH, JournalFile
from nvfp4_prep.output.noted_files import (
    Elsewhere,
    FileState,
    NotedFile,
    check_unchanged,
    file_line,
    foreign_line,
    judge_files,
    know_cut_off,
    made_line,
)
from nvfp4_prep.output.outline import Outline, find_known, have_same_bytes
from nvfp4_prep.output.target_checks import (
    LAST_FILES,
    PARTS_FOLDER,
    SOURCE_FOLDER,
    check_names,
    check_ours,
    check_space,
    file_change,
    foreign_file,
)
from nvfp4_prep.output.target_lock import LOCK, check_locks, take_lock
from nvfp4_prep.output.target_root import TargetRoot

__all__ = ["Target"]


class Target:
    """An output directory in work; use as a context manager.

    Attributes:
        path: the directory.
        work: its ``.nvfp4_prep`` folder.
        done: journal entries of finished files by name.
        resumed: whether an earlier run's work was found.
        verdicts: what :meth:`note_wrong` was told, in this run and earlier ones, and
            :data:`~nvfp4_prep.output.journal.LOST_VERDICT` where that may have been lost.
    """

    def __init__(
        self, root: TargetRoot, lock: int, identity: Mapping[str, Any], elsewhere: Elsewhere, *, need_sha256: bool
    ) -> None:
        """Take over a directory whose lock this process holds; :meth:`open` says what the rest is."""
        self.path = root.path
        self.work = root.path / WORK_FOLDER
        self.done: dict[str, JournalEntry] = {}
        self.resumed = False
        self.verdicts: list[dict[str, Any]] = []
        self._root, self._lock = root, lock
        self._journal = JournalFile(root)
        self._identity = json.loads(json.dumps(identity))
        self._elsewhere = elsewhere
        self._need_sha256 = need_sha256
        self._made: Sequence[Path] = ()  # the folders that this run made
        self._seen: dict[str, os.stat_result] = {}  # the files that this run wrote or found
        self._unnamed: set[str] = set()  # files that fit the plan and are in no line of the journal
        self._ours: dict[str, os.stat_result] = {}  # files of an earlier run which must be written again
        self._touched: dict[str, NotedFile] = {}  # named by the journal, but touched since then

    @classmethod
    def open(
        cls,
        path: Path,
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        elsewhere: Elsewhere = lambda name, nbytes, sha256: False,
        need_sha256: bool = True,
    ) -> Target:
        """Make and lock the directory for one job, and read its journal.

        Args:
            path: the directory; created if it does not exist.
            identity: JSON value that says what will be written from what; a resumed run must have the same.
            restart: forget an earlier unfinished run.
            elsewhere: see :data:`Elsewhere`.
            need_sha256: whether a finished file without its sha256 in the journal is made again.

        Raises:
            TargetError: not empty and not ours, or not writable.
            BusyError: another run holds it.
            ResumeConflictError: it holds an unfinished run with another identity.
        """
        check_ours(path)
        check_locks(path)
        work = path / WORK_FOLDER
        made = [folder for folder in (work, *work.parents) if not folder.exists()]
        try:
            root = TargetRoot.open(path, make=True)
            target = cls(root, _lock_work_folder(root, made), identity, elsewhere, need_sha256=need_sha256)
        except OSError as error:
            raise translate_os_error(error, work) from error
        target._made = made
        try:
            check_ours(path)  # again: another run may have finished before this one had the lock
            if restart:
                target._forget()
            target.resumed = target._read_journal(anew=restart)
        except BaseException:
            target._close()
            raise
        return target

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

    def _forget(self) -> None:
        try:
            files = list(judge_files(self._root, read_journal(self._root).lines, need_sha256=False))
            # before anything is gone; what a damaged line or a cut off file is, check_names tells
            check_unchanged(self.path, (file for file in files if file.entry and not file.may_be_cut_off))
            names = {file.name for file in files}
            own = [file for file in files if file.is_own]  # nothing else is ours
            self._touched = {file.name: file for file in files if file.state is FileState.CHANGED}
            for file in sorted(own, key=lambda file: file.name not in LAST_FILES):  # first what vouches for the others
                if file_change(file.status, self._root.status(file.name)) is None:
                    self._root.unlink(file.name)
            self._root.unlink(VERDICTS_PATH)
            for folder in {name.rpartition("/")[0] for name in names}:
                if not folder or self._root.status(folder) is not None:
                    self._root.sync(folder)  # before the journal: what it does not name is not ours
        except OSError as error:
            raise translate_os_error(error, self.path) from error
        self._journal.empty()

    def _read_journal(self, *, anew: bool) -> bool:
        """Take over what an earlier run did; with ``anew`` nothing that it judged holds any more."""
        try:
            for leftover in self._root.names(WORK_FOLDER):
                if leftover not in (LOCK, JOURNAL, VERDICTS, SOURCE_FOLDER, PARTS_FOLDER):
                    self._root.remove_tree(f"{WORK_FOLDER}/{leftover}")
            journal = read_journal(self._root)
            lines = journal.lines
            if lines:
                check_identity(self.path, journal, self._identity)
            self.verdicts = [] if anew else due_verdicts(journal, self._root)
            if not lines:
                self._journal.empty()
                self.note({"identity": self._identity})
                self._note_lost_verdict(lines)
                return False
            self._journal.repair_tail(keep=journal.doubtful_tail and LOST_VERDICT in self.verdicts)
            self._note_lost_verdict(lines)
            for file in judge_files(self._root, lines, self._elsewhere, need_sha256=self._need_sha256):
                self._take_over(file)
        except OSError as error:
            raise translate_os_error(error, self.work) from error
        return True

    def _take_over(self, file: NotedFile) -> None:
        """Believe what was found of a file that the journal names."""
        entry, status = file.entry, file.status
        if file.state is FileState.FINISHED and entry is not None:
            self.done[file.name] = entry
            if status is not None:
                self._seen[file.name] = status
                if entry.mtime_ns not in (None, status.st_mtime_ns):  # it was read; need not be again
                    self.note(replace(entry, mtime_ns=status.st_mtime_ns))
        elif status is not None and file.is_own:
            self._ours[file.name] = status
        elif status is not None:
            self._touched[file.name] = file

    def _note_lost_verdict(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Note that a verdict may be lost: what shows it, a manifest that the journal does not name, will not stay."""
        if LOST_VERDICT in self.verdicts and LOST_VERDICT not in lines:
            self.note(LOST_VERDICT)

    def note(self, entry: Mapping[str, Any] | JournalEntry) -> None:
        """Append one line to the journal and flush it to disk."""
        self._journal.append(entry, self.done)

    def note_wrong(self, scope: Mapping[str, Any]) -> None:
        """Note that the finished files were found wrong, and where, so that no later run passes over that verdict."""
        verdict = wrong_verdict(scope)
        self._journal.count_verdict()
        self.note(verdict)
        self.verdicts.append(verdict)

    def check_names(self, expected: Iterable[str], outlines: Mapping[str, Outline] | None = None) -> None:
        """Check that the directory holds no file that this run neither wrote nor will write.

        Args:
            expected: names that this run will write.
            outlines: of such files, by which one is known that a damaged journal has lost: it may stay until it is
                made again with the same bytes.

        Raises:
            TargetError: if there is another file, or one of an earlier run was changed since then.
        """
        outlines = outlines or {}
        touched = know_cut_off(self._root, self._touched.values(), outlines)
        check_unchanged(self.path, touched)
        self._ours |= {file.name: file.status for file in touched if file.is_own and file.status is not None}
        self._touched = {file.name: file for file in touched if not file.is_own}
        # what this run will write and an earlier one did not begin with is somebody else's
        begun = {*self.done, *self._ours, *self._touched}
        others = {name: self._root.status(name) for name in expected if name not in begun}
        there = {name: status for name, status in others.items() if status is not None}
        known = find_known(self._root, there, outlines)
        foreign = [name for name in there if name not in known]
        if foreign:
            raise foreign_file(self.path / min(foreign))
        check_names(self.path, begun | known)
        self._ours |= {name: there[name] for name in known if outlines[name].whole is not None}
        self._unnamed = known

    def check_space(self, needed_nbytes: int) -> None:
        """Raise :class:`NoSpaceError` if the file system has less room than that (:attr:`Room.needed_nbytes`)."""
        check_space(self.path, needed_nbytes, free_nbytes(self.path))

    def create(self, name: str, nbytes: int) -> AtomicFile:
        """Create a file at its temporary place, with its space allocated.

        Raises:
            TargetError: if the name would lead out of the directory or into its work folder.
        """
        return self._create(name, nbytes, file_line)

    def _create(self, name: str, nbytes: int, line_of: Callable[..., Mapping[str, Any]]) -> AtomicFile:
        if not is_safe_name(name) or name.split("/")[0] == WORK_FOLDER:
            raise TargetError(
                f"unsafe output file name {name!r}",
                where=str(self.path),
                expected="a relative path inside the target",
                next_step="The name comes from the input checkpoint: do not trust that checkpoint.",
            )
        temporary = f"{self._writing}/{name}"

        def put_in_place(entry: Mapping[str, Any], status: os.stat_result) -> None:
            self._place(line_of(name, entry, status), temporary, name, status)

        return AtomicFile(self._root, temporary, nbytes, put_in_place)

    def _place(
        self,
        line: Mapping[str, Any] | JournalEntry,
        old: str,
        name: str,
        status: os.stat_result,
        root: TargetRoot | None = None,
    ) -> None:
        """Note a whole file and give it its name; what must stay there is refused before the journal has that name."""
        now, own = self._root.status(name), self._is_own(name)
        replace = own or (now is not None and have_same_bytes(root or self._root, old, self._root, name))
        if now is not None and not replace:
            raise self._in_the_way(name)
        self.note(line)  # first: a file that has its name and that the journal does not know is not ours
        try:
            self._root.move(old, name, replace=replace, root=root)
        except FileExistsError as error:
            self.note(foreign_line(name))
            raise self._in_the_way(name) from error
        self._seen[name] = status
        self._ours.pop(name, None)
        self._touched.pop(name, None)

    def _is_own(self, name: str) -> bool:
        """Return whether a file that this run may replace is still the one that it wrote or found."""
        return file_change(self._ours.get(name, self._seen.get(name)), self._root.status(name)) is None

    def _in_the_way(self, name: str) -> TargetError:
        if name in self._touched:
            what = "was changed since the unfinished run wrote it: other bytes were made for its place"
        elif name in self._unnamed:
            what = "has other bytes than the file that was made for its place, and the journal does not name it"
        else:
            what = "would replace a file that another program put there while this run worked"
        again = "Move it out of the target and run the same command again, without --restart: finished files are kept."
        return TargetError(what, where=str(self.path / name), next_step=again)

    def adopt(self, entry: JournalEntry, other: Target) -> None:
        """Take over a file that another target on this file system finished, with its journal entry."""
        status, seen = other._root.status(entry.file), other._seen.get(entry.file)
        actual = file_change(seen, status)
        if status is None or actual is not None:
            raise _changed_meanwhile(other.path / entry.file, seen, actual)
        try:
            line = replace(entry, mtime_ns=status.st_mtime_ns)
            self._place(line, entry.file, entry.file, status, other._root)
        except OSError as error:
            raise translate_os_error(error, self.path / entry.file) from error

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file whole; the journal does not call it finished, so a resumed run writes it again."""
        file = self._create(name, len(data), made_line)
        file.write(0, data)
        file.commit({"sha256": hashlib.sha256(data).hexdigest()})

    def remove_file(self, name: str, data: bytes) -> None:
        """Remove a file of an earlier run that :meth:`write_file` will write again with these bytes.

        Raises:
            TargetError: if it was touched or replaced since then and has other bytes.
        """
        if name not in self._ours and name not in self._touched:
            return
        same = self._is_own(name) or Outline(whole=lambda: data).fits(self._root, name)
        if not same and self._root.status(name) is not None:
            raise self._in_the_way(name)
        self._root.unlink(name)
        self._ours.pop(name, None)
        self._touched.pop(name, None)

    def check_files(self) -> None:
        """Look at all finished files again.

        Raises:
            TargetError: if one is missing or is not the file any more that this run wrote or found.
        """
        for name in sorted({*self.done, *self._seen}):
            entry, seen, now = self.done.get(name), self._seen.get(name), self._root.status(name)
            if now is None and entry is not None and self._elsewhere(name, entry.nbytes, entry.sha256):
                continue
            actual = file_change(seen, now)
            if actual is not None:
                raise _changed_meanwhile(self.path / name, seen, actual)

    def finish(self) -> None:
        """Remove journal and work folder: the directory is a finished output now.

        The journal goes first and at once: files beside a work folder without a journal are a finished output, so a
        kill in between leaves nothing that another run would take for its own. The same command finds the output
        finished and removes the rest (:func:`~nvfp4_prep.output.finished_output.remove_finished_work`).
        """
        try:
            self._root.unlink(JOURNAL_PATH)
            self._root.sync(WORK_FOLDER)
            self._root.remove_tree(WORK_FOLDER)
            self._root.sync()
        except OSError as error:
            raise translate_os_error(error, self.work) from error


def _changed_meanwhile(path: Path, seen: os.stat_result | None, actual: str | None) -> TargetError:
    return TargetError(
        "a finished file was changed or removed by another program while this run worked",
        where=str(path),
        expected="the file that was written" if seen is None else f"{seen.st_size} bytes",
        actual=actual,
        next_step="Remove that file if it is there and run the same command again: it is made anew.",
    )


def _lock_work_folder(root: TargetRoot, made: Sequence[Path]) -> int:
    """Return the lock's descriptor; without one the root is closed, and where there are no locks, nothing is left."""
    try:
        root.make_folder(WORK_FOLDER)
        return take_lock(root)
    except BaseException as error:
        root.close()
        if isinstance(error, TargetError):
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()
        raise
