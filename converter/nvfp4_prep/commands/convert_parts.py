"""One conversion by several machines on one file system: parts of the layers, and the step that joins them.

Every machine plans the whole conversion and makes the experts' files of its layers in a folder of its own, with its
own lock and journal, so parts never meet. The join renames the finished files into place and makes the rest. Since
the plan is the same and the files are, the joined checkpoint has the bytes of an undivided conversion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nvfp4_prep._util.progress import NoProgress, Progress
from nvfp4_prep._util.text import count, spans
from nvfp4_prep._version import __version__
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.convert import ConvertResult, check_apart, check_arguments, complete_manifest, open_source
from nvfp4_prep.errors import PartsMissingError, ResumeConflictError, UsageError, VerificationError
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.output.journal_entry import JournalEntry
from nvfp4_prep.output.layer_selection import LayerSelection, list_parts, part_folder
from nvfp4_prep.output.sink import KeepFiles
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.runner import Execution
from nvfp4_prep.planning.builder import make_plan
from nvfp4_prep.planning.plan import OutputFile, Plan
from nvfp4_prep.smoke.gate import DEFAULT_SMOKE, SmokePolicy

__all__ = [
    "PartResult",
    "check_not_whole",
    "check_whole",
    "choose_part",
    "convert_part",
    "finished_entries",
    "join_parts",
    "part_identity",
]

_DIVISIBLE = (FileKind.EXPERTS, FileKind.SOURCE_BLOCK_SCALES)
"""Files that parts make; all others are small and left to the join."""


@dataclass(frozen=True)
class PartResult:
    """What a part of a conversion left.

    Attributes:
        path: the part's folder; nothing in it is to be used before the join.
        layers: the model's numbers of its layers.
        files: how many files they have.
        resumed: whether an earlier run's files were kept.
        joined: the target is a whole checkpoint already: nothing had to be done.
        written_nbytes: bytes written by this run.
    """

    path: Path
    layers: tuple[int, ...]
    files: int
    resumed: bool
    joined: bool
    written_nbytes: int

    def __repr__(self) -> str:
        return (
            f"PartResult({str(self.path)!r}, layers={len(self.layers)}, files={self.files}, resumed={self.resumed},"
            f" joined={self.joined}, written_nbytes={self.written_nbytes})"
        )


def convert_part(
    source: str | Path | Source,
    target: str | Path,
    layers: str | LayerSelection,
    options: ConvertOptions | None = None,
    *,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> PartResult:
    """Prepare some of the layers, for :func:`join_parts`. Killed at any moment, the same call continues.

    Any number of parts may run at once, on any machines that see source and target. Parts may overlap: the bytes are
    the same. Peak memory as for :func:`~nvfp4_prep.commands.convert.convert`.

    Args:
        source: a directory, or an opened source; the same for all parts.
        target: the whole conversion's output directory.
        layers: which, as :meth:`LayerSelection.parse` takes it: ``1-20``, ``3,7-9``, ``2/8``.
        options: the same for all parts.
        threads: workers; does not change the output.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: told how it goes.
        restart: discard this part's unfinished earlier run.

    Raises:
        UsageError: if no MoE layer is selected.
        ResumeConflictError: if the target is being joined or converted as a whole.
        BusyError: if the same part is at work elsewhere.
        NvfpPrepError: as :func:`~nvfp4_prep.commands.convert.convert`.
    """
    selection = LayerSelection.parse(layers) if isinstance(layers, str) else layers
    path = Path(target)
    opened = open_source(source, part_folder(path, selection))
    try:
        check_apart(opened, path)
        made = make_plan(opened, options)
        part = choose_part(made, selection)
        chosen = selection.choose(plan.index for plan in made.layers)
        folder = part_folder(path, selection)
        if complete_manifest(path, made, KeepFiles()) is not None:
            return PartResult(folder, chosen, len(part.files), resumed=False, joined=True, written_nbytes=0)
        Target.check_ours(path)
        check_not_whole(path)
        with Target(folder, part_identity(made, selection), restart=restart) as place:
            written = Execution(part, opened, place, KeepFiles()).write(
                threads, progress or NoProgress(), memory_nbytes
            )
            return PartResult(folder, chosen, len(part.files), place.resumed, joined=False, written_nbytes=written)
    finally:
        opened.close()


def join_parts(
    source: str | Path | Source,
    target: str | Path,
    options: ConvertOptions | None = None,
    *,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
    smoke: SmokePolicy | None = DEFAULT_SMOKE,
) -> ConvertResult:
    """Make a whole checkpoint of finished parts. Killed at any moment, the same call continues.

    Args:
        source, options: the parts'.
        target: the output directory that was given for the parts.
        threads: workers.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: told how it goes.
        smoke: as for :func:`~nvfp4_prep.commands.convert.convert`.

    Raises:
        PartsMissingError: if layers are missing; nothing was changed.
        BusyError: if a part is at work.
        ResumeConflictError: if a part was made from another source, with other options or by another version.
        VerificationError: if two parts made the same file with different bytes.
        NvfpPrepError: as :func:`~nvfp4_prep.commands.convert.convert`.
    """
    check_arguments(options, threads, smoke)
    path = Path(target)
    opened = open_source(source, path)
    try:
        check_apart(opened, path)
        made = make_plan(opened, options)
        complete = complete_manifest(path, made, KeepFiles())
        if complete is not None:
            return ConvertResult(path, complete, False, True, 0, left_out=made.left_out, warnings=made.warnings)
        with contextlib.ExitStack() as held:
            parts = [
                held.enter_context(Target(folder, part_identity(made, LayerSelection.parse(text))))
                for text, folder in list_parts(path).items()
            ]
            entries = finished_entries({part.path: part.done for part in parts})
            if not Target.has_journal(path):  # else a join was begun, when nothing was missing
                check_whole(made, entries, path)
            place = held.enter_context(Target(path, made.identity()))
            for part in parts:
                for name, entry in part.done.items():
                    if name not in place.done:
                        place.adopt(entry, part)
            execution = Execution(made, opened, place, KeepFiles())
            written = execution.write(threads, progress or NoProgress(), memory_nbytes)
            manifest, report = execution.finish(smoke)
            return ConvertResult(
                path,
                manifest,
                place.resumed,
                already_complete=False,
                written_nbytes=written,
                left_out=made.left_out,
                warnings=made.warnings,
                smoke=report,
            )
    finally:
        opened.close()


def choose_part(made: Plan, selection: LayerSelection) -> Plan:
    """Return the plan with the files of these layers alone; raises :class:`UsageError` if they are none."""
    present = [plan.index for plan in made.layers]
    chosen = selection.choose(present)
    if not chosen:
        raise UsageError(
            f"--layers {selection.text} selects none of the MoE layers",
            where=made.source_label,
            next_step=f"They are {spans(present)}.",
        )
    return replace(made, files=tuple(file for file in made.files if _layer_of(made, file) in chosen), side_files=())


def part_identity(made: Plan, selection: LayerSelection) -> dict[str, object]:
    """What a part's resumed run must find again."""
    return {**made.identity(), "tool": __version__, "layers": selection.text}


def _layer_of(made: Plan, file: OutputFile) -> int | None:
    """Return the model's number of the layer, for a file that parts make."""
    if file.kind not in _DIVISIBLE or file.layer_position is None:
        return None
    return made.layers[file.layer_position].index


def check_not_whole(path: Path) -> None:
    """Raise :class:`ResumeConflictError` if the directory itself, not a part in it, is worked on."""
    if Target.has_journal(path):
        raise ResumeConflictError(
            "is being converted as a whole, or joined",
            where=str(path),
            next_step="Finish that first, or give another target.",
        )


def finished_entries(parts: Mapping[Path, Mapping[str, JournalEntry]]) -> dict[str, JournalEntry]:
    """Journal entries of all parts' finished files by name.

    Raises:
        VerificationError: if two parts made a file with different bytes.
    """
    found: dict[str, JournalEntry] = {}
    for path, done in parts.items():
        for name, entry in done.items():
            other = found.setdefault(name, entry)
            if other.sha256 != entry.sha256:
                raise VerificationError(
                    "two parts made this file with different bytes",
                    where=name,
                    expected=f"sha256 {other.sha256}",
                    actual=f"{entry.sha256} in {path}",
                    next_step="One of the machines is broken: remove both parts and make them again elsewhere.",
                )
    return found


def check_whole(made: Plan, entries: Mapping[str, JournalEntry], path: Path) -> None:
    """Raise :class:`PartsMissingError` if layers have files that no part finished."""
    missing = sorted(
        {layer for file in made.files if (layer := _layer_of(made, file)) is not None and file.name not in entries}
    )
    if missing:
        raise PartsMissingError(
            f"{len(missing)} of {count(len({plan.index for plan in made.layers}), 'MoE layer')}"
            f" {'is' if len(missing) == 1 else 'are'} not made yet:"
            f" {spans(missing)}",
            where=str(path),
            next_step=f"Run convert with --layers {spans(missing)}, then join again.",
        )
