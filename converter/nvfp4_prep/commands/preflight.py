"""What a conversion would find at its target, for ``--dry-run``. Nothing is written, made or removed."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4_prep.checkpoint.filenames import JOURNAL, WORK_FOLDER
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.convert import check_apart, check_not_divided, find_complete
from nvfp4_prep.commands.convert_parts import check_not_whole, check_whole, choose_part, finished_entries, part_identity
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.output.atomic_file import free_nbytes
from nvfp4_prep.output.journal import check_identity, finished_files, named_files, read_lines
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.layer_selection import LayerSelection, list_parts, part_folder
from nvfp4_prep.output.sink import FileSink, KeepFiles
from nvfp4_prep.output.target import LAST_FILES, LOCK, PARTS_FOLDER, SOURCE_FOLDER, Target, check_names, check_space
from nvfp4_prep.output.target_root import TargetRoot
from nvfp4_prep.planning.disk_space import room_for
from nvfp4_prep.planning.plan import Plan

__all__ = ["Outlook", "TargetState", "look_ahead"]


class TargetState(enum.StrEnum):
    """What a target is for a conversion."""

    NEW = "new"
    CONTINUES = "continues"
    COMPLETE = "complete"
    REFUSED = "refused"


@dataclass
class Outlook:
    """What would happen at a target.

    Attributes:
        path: the target.
        state: see :class:`TargetState`.
        done: files of an earlier run that would be kept.
        needed_nbytes: room that the run would ask for; 0 where nothing is to be done, or that was not reached.
        free_nbytes: what it would find, with what it would delete first.
        refusal: what the run would end with at once.
    """

    path: Path
    state: TargetState = TargetState.NEW
    done: int = 0
    needed_nbytes: int = 0
    free_nbytes: int = 0
    refusal: NvfpPrepError | None = None

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """What is raised here is the refusal."""
        try:
            yield
        except NvfpPrepError as error:
            self.state, self.refusal = TargetState.REFUSED, error


def look_ahead(
    made: Plan,
    source: Source,
    target: Path,
    sink: FileSink,
    *,
    selection: LayerSelection | None = None,
    join: bool = False,
    restart: bool = False,
) -> Outlook:
    """Go through what a conversion checks before its first byte, in its order, and only looks.

    Args:
        made: the plan of the whole conversion.
        source: where it was made of.
        target: the output directory.
        sink: as for :func:`~nvfp4_prep.commands.convert.convert`.
        selection: for a part: its layers.
        join: whether parts are to be joined.
        restart: whether an unfinished run would be discarded.
    """
    outlook = Outlook(target)
    with outlook.refusing():
        check_apart(source, target)
        if not (restart or join or selection):
            check_not_divided(target)
        part = made if selection is None else choose_part(made, selection)
        if find_complete(target, made, sink) is not None:
            outlook.state = TargetState.COMPLETE
            return outlook
        place, identity = target, made.identity()
        if selection is not None:
            Target.check_ours(target)
            check_not_whole(target)
            place, identity = part_folder(target, selection), part_identity(made, selection)
        joined = _look_at_parts(made, target) if join else {}
        done = {**joined, **_look_at(place, identity, sink, restart=restart)}
        if Target.has_journal(place) and not restart:
            outlook.state = TargetState.CONTINUES
        outlook.done = len(done)
        _check_files(place, done, restart=restart)
        outlook.needed_nbytes = room_for(part, done, source, sink).needed_nbytes
        outlook.free_nbytes = free_nbytes(place) + _freed_nbytes(place, restart=restart)
        check_space(place, outlook.needed_nbytes, outlook.free_nbytes)
    return outlook


def _look_at(path: Path, identity: Mapping[str, Any], sink: FileSink, *, restart: bool) -> dict[str, JournalEntry]:
    """Return the files that a run in this directory would keep; raises as :class:`Target` does."""
    Target.check_ours(path)
    Target.check_idle(path)
    if restart or not Target.has_journal(path):
        return {}
    with TargetRoot(path) as root:
        lines = read_lines(root)
        if not lines:
            return {}
        check_identity(path, lines[0].get("identity"), identity)
        return finished_files(root, lines, sink.holds)


def _look_at_parts(made: Plan, target: Path) -> dict[str, JournalEntry]:
    """Return the files that a join would find; raises as :func:`~nvfp4_prep.commands.convert_parts.join_parts` does."""
    parts = {
        folder: _look_at(folder, part_identity(made, LayerSelection.parse(text)), KeepFiles(), restart=False)
        for text, folder in list_parts(target).items()
    }
    entries = finished_entries(parts)
    if not Target.has_journal(target):
        check_whole(made, entries, target)
    return entries


def _check_files(path: Path, done: Collection[str], *, restart: bool) -> None:
    begun: list[str] = []
    if Target.has_journal(path):
        with TargetRoot(path) as root:
            begun = named_files(read_lines(root)) + list(LAST_FILES if restart else ())
    check_names(path, {*done, *begun})


def _freed_nbytes(path: Path, *, restart: bool) -> int:
    """What the run would delete before it asks for room: half files of a killed run, all of it with ``restart``."""
    freed = 0
    for file in path.rglob("*"):
        places = file.relative_to(path).parts
        in_work = places[0] == WORK_FOLDER and len(places) > 1
        if in_work and places[1] in (LOCK, JOURNAL, SOURCE_FOLDER):
            continue
        if (restart or (in_work and places[1] != PARTS_FOLDER)) and file.is_file() and not file.is_symlink():
            freed += file.stat().st_blocks * 512
    return freed
