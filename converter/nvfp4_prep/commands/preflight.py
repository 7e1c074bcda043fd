"""The checks before the first byte of a conversion, in their order, for a run and for ``--dry-run``."""

from __future__ import annotations

import contextlib
import enum
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep._util.places import overlaps
from nvfp4_prep.checkpoint.filenames import JOURNAL, VERDICTS, WORK_FOLDER
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.finished_conversion import find_complete
from nvfp4_prep.commands.part_checks import (
    check_not_divided,
    check_not_whole,
    check_whole,
    choose_part,
    finished_entries,
    part_identity,
    part_outlines,
)
from nvfp4_prep.errors import NoSpaceError, NvfpPrepError, ResumeConflictError, TargetError
from nvfp4_prep.output.atomic_file import free_nbytes, translate_os_error
from nvfp4_prep.output.finished_output import remove_finished_work
from nvfp4_prep.output.journal import (
    LOST_VERDICT,
    check_identity,
    due_verdicts,
    read_journal,
)
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.layer_selection import LayerSelection, list_parts, part_folder
from nvfp4_prep.output.noted_files import (
    FileState,
    NotedFile,
    check_unchanged,
    finished_among,
    judge_files,
    know_cut_off,
)
from nvfp4_prep.output.outline import Outline, find_known
from nvfp4_prep.output.sink import FileSink, KeepFiles
from nvfp4_prep.output.target_checks import (
    PARTS_FOLDER,
    SOURCE_FOLDER,
    check_names,
    check_ours,
    check_reachable,
    check_space,
    check_writable,
    has_journal,
)
from nvfp4_prep.output.target_lock import LOCK, check_idle
from nvfp4_prep.output.target_root import TargetRoot
from nvfp4_prep.pipeline.foresight import check_readable
from nvfp4_prep.pipeline.outlines import plan_outlines
from nvfp4_prep.planning.disk_space import room_for
from nvfp4_prep.planning.plan import Plan
from nvfp4_prep.prepared.manifest import Manifest

__all__ = [
    "JUDGED_JOIN",
    "PARTS_ANEW",
    "Outlook",
    "TargetState",
    "check_apart",
    "check_place",
    "check_reachable",
    "judged_wrong",
    "look_ahead",
    "preflight",
]


PARTS_ANEW = "remove the directory and make its parts again."
JUDGED_JOIN = f"Run the same command without --no-smoke, or {PARTS_ANEW}"


class TargetState(enum.StrEnum):
    """State of a target, as a conversion sees it."""

    NEW = "new"
    CONTINUES = "continues"
    COMPLETE = "complete"
    REFUSED = "refused"


@dataclass
class Outlook:
    """Outlook on a target: the state it is in, and how a run would end there.

    Attributes:
        path: the target.
        state: see :class:`TargetState`.
        done: files of an earlier run that would be kept.
        needed_nbytes: room that the run would ask for; 0 where nothing is to be done, or that was not reached.
        free_nbytes: what it would find, with what it would delete first.
        refusal: what the run would end with at once.
        complete: the manifest of a target that is finished already.
    """

    path: Path
    state: TargetState = TargetState.NEW
    done: int = 0
    needed_nbytes: int = 0
    free_nbytes: int = 0
    refusal: NvfpPrepError | None = None
    complete: Manifest | None = None

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Keep the error that is raised inside as the refusal."""
        try:
            yield
        except NvfpPrepError as error:
            self.state, self.refusal = TargetState.REFUSED, error


def check_place(
    source: Source,
    target: Path,
    *,
    selection: LayerSelection | None = None,
    join: bool = False,
    restart: bool = False,
) -> None:
    """Check what needs no plan, and so comes before one is made; arguments as for :func:`preflight`.

    Raises:
        TargetError: if source and target are not apart, or the target cannot be reached.
        ResumeConflictError: if parts work in a target that is to be converted as a whole.
    """
    check_reachable(target)
    check_apart(source, target)
    if not (restart or join or selection):
        check_not_divided(target)


def look_ahead(
    plan: Plan,
    source: Source,
    target: Path,
    sink: FileSink,
    *,
    selection: LayerSelection | None = None,
    join: bool = False,
    restart: bool = False,
    smoke: bool = True,
    read: bool = True,
) -> Outlook:
    """Check all that must hold before the first byte is written; only look.

    Args:
        plan: the plan of the whole conversion.
        source: the source that it was made of.
        target: the output directory.
        sink: as for :func:`~nvfp4_prep.commands.convert.convert`.
        selection: for a part: its layers.
        join: whether parts are to be joined.
        restart: whether an unfinished run is to be discarded.
        smoke: whether the run would end with a smoke run.
        read: whether finished files that were touched since they were written are read, as the run itself will.
    """
    outlook = Outlook(target)
    with outlook.refusing():
        check_place(source, target, selection=selection, join=join, restart=restart)
        part = plan if selection is None else choose_part(plan, selection)
        outlook.complete = find_complete(target, plan, sink)
        if outlook.complete is not None:
            outlook.state = TargetState.COMPLETE
            return outlook
        check_writable(target)
        check_readable(plan, source.where())
        folder, identity = target, plan.identity()
        if selection is not None:
            check_ours(target)
            check_not_whole(target)
            folder, identity = part_folder(target, selection), part_identity(plan, selection)
        elif restart:
            _check_discarded_parts(plan, target, read=read)
        with _advising_joins(target) if join else contextlib.nullcontext():
            joined = _look_at_parts(plan, target, read=read) if join else {}
            noted = _look_at(folder, identity, sink, restart=restart, read=read)
        done = {**joined, **({} if restart else finished_among(noted))}
        _check_files(folder, noted, plan_outlines(part), restart=restart)
        if not smoke and selection is None and not restart:
            _check_not_judged_wrong(folder, join=join)
        if has_journal(folder) and not restart:
            outlook.state = TargetState.CONTINUES
        outlook.done = len(done)
        outlook.needed_nbytes = room_for(part, done, source, sink).needed_nbytes
        outlook.free_nbytes = free_nbytes(folder) + _freed_nbytes(folder, restart=restart)
        check_space(folder, outlook.needed_nbytes, outlook.free_nbytes)
    return outlook


def preflight(
    plan: Plan,
    source: Source,
    target: Path,
    sink: FileSink,
    *,
    selection: LayerSelection | None = None,
    join: bool = False,
    restart: bool = False,
) -> Manifest | None:
    """Refuse a run for what ``--dry-run`` would say of it, before it opens its target.

    What another program may change in between, the target checks again under its lock. Disk space is left to it:
    here what the run deletes first is only estimated.

    Args:
        plan, source, target, sink, selection, join, restart: as for :func:`look_ahead`.

    Returns:
        The manifest, if the target is finished already; what a kill in its last moment left is removed then.

    Raises:
        NvfpPrepError: the outlook's refusal, unless it is for want of disk space.
    """
    outlook = look_ahead(plan, source, target, sink, selection=selection, join=join, restart=restart, read=False)
    if outlook.refusal is not None and not isinstance(outlook.refusal, NoSpaceError):
        raise outlook.refusal
    if outlook.complete is not None:
        remove_finished_work(target)
    return outlook.complete


def check_apart(source: Source, target: Path) -> None:
    """Raise :class:`TargetError` if target and source directory are the same or one lies in the other."""
    root = getattr(source, "root", None)
    if not isinstance(root, Path):
        return
    if overlaps(target, root):
        raise TargetError(
            "target and source are the same directory or one lies in the other",
            where=str(target),
            next_step="Give a target outside the source: the source is never touched.",
        )


def _look_at(
    path: Path, identity: Mapping[str, Any], sink: FileSink, *, restart: bool = False, read: bool
) -> list[NotedFile]:
    """Return the files that the journal of this directory names; raises as :class:`Target` does."""
    check_ours(path)
    check_idle(path)
    if not has_journal(path):
        return []
    try:
        with TargetRoot.open(path) as root:
            for name in (LOCK, JOURNAL):
                if root.status(f"{WORK_FOLDER}/{name}") is not None:
                    os.close(root.open_file(f"{WORK_FOLDER}/{name}", os.O_WRONLY))  # as the run will; writes nothing
            journal = read_journal(root)
            if journal.lines and not restart:
                check_identity(path, journal, identity)
            # what is to be discarded need not be finished, as long as it is ours
            return list(judge_files(root, journal.lines, sink.holds, need_sha256=not restart, read=read))
    except OSError as error:
        raise translate_os_error(error, path / WORK_FOLDER) from error


def _look_at_parts(plan: Plan, target: Path, *, read: bool) -> dict[str, JournalEntry]:
    """Return the files that a join would find; raises as :func:`~nvfp4_prep.commands.convert_parts.join_parts` does."""
    parts = {}
    for text, folder in list_parts(target).items():
        selection = LayerSelection.parse(text)
        noted = _look_at(folder, part_identity(plan, selection), KeepFiles(), read=read)
        _check_files(folder, noted, part_outlines(plan, selection), restart=False)
        parts[folder] = finished_among(noted)
    entries = finished_entries(parts)
    if not has_journal(target):
        check_whole(plan, entries, target)
    return entries


def _check_discarded_parts(plan: Plan, target: Path, *, read: bool) -> None:
    """Refuse what :func:`~nvfp4_prep.output.layer_selection.discard_parts` will."""
    for text, folder in list_parts(target).items():
        noted = _look_at(folder, {}, KeepFiles(), restart=True, read=read)
        _check_files(folder, noted, part_outlines(plan, LayerSelection.parse(text)), restart=True)


@contextlib.contextmanager
def _advising_joins(target: Path) -> Iterator[None]:
    """Give a refusal of what a join would take the advice that helps a join, which has no ``--restart``."""
    try:
        yield
    except ResumeConflictError as error:
        anew = PARTS_ANEW if has_journal(target) else "make that part anew: its own command with --restart."
        error.next_step = f"Join with the source and options that the parts were made with, or {anew}"
        raise


def _check_not_judged_wrong(path: Path, *, join: bool) -> None:
    if has_journal(path):
        with TargetRoot.open(path) as root:
            verdicts = due_verdicts(read_journal(root), root)
        if verdicts:
            error = judged_wrong(path, verdicts)
            error.next_step = JUDGED_JOIN if join else error.next_step
            raise error


def judged_wrong(path: Path, verdicts: Sequence[Mapping[str, Any]]) -> ResumeConflictError:
    """Return the refusal to finish, without a smoke run, what an earlier one found wrong, or may have found so."""
    lost = all(verdict == LOST_VERDICT for verdict in verdicts)
    return ResumeConflictError(
        "the journal is damaged where it may have said that the smoke test of these files failed, and only another"
        " smoke test can clear them"
        if lost
        else "the smoke test of these files failed, and only another smoke test can clear them",
        where=str(path),
        next_step="Convert with a smoke test, which --no-smoke and --stream-out leave out, or anew by --restart.",
    )


def _check_files(path: Path, noted: Sequence[NotedFile], outlines: Mapping[str, Outline], *, restart: bool) -> None:
    """Raise :class:`TargetError` if a run would find a file that it neither takes over nor may write again."""
    known = set()
    if has_journal(path):
        with TargetRoot.open(path) as root:
            noted = know_cut_off(root, noted, outlines)
            check_unchanged(path, noted)
            known = {file.name for file in noted if file.is_own or (not restart and file.state is FileState.TOUCHED)}
            known |= find_known(root, outlines.keys() - known, outlines)
    check_names(path, known)


def _freed_nbytes(path: Path, *, restart: bool) -> int:
    """Return the bytes that a run would delete before it asks for disk space: half files, or all with ``restart``."""
    freed = 0
    for file in (Path(folder) / name for folder, _, names in os.walk(path) for name in names):
        places = file.relative_to(path).parts
        in_work = places[0] == WORK_FOLDER and len(places) > 1
        if in_work and places[1] in (LOCK, JOURNAL, VERDICTS, SOURCE_FOLDER):
            continue
        if restart or (in_work and places[1] != PARTS_FOLDER):
            with contextlib.suppress(FileNotFoundError):  # another run is at work there
                status = file.lstat()
                freed += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return freed
