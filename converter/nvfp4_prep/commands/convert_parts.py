"""One conversion by several machines on one file system: parts of the layers, and the step that joins them.

Every machine plans the whole conversion and makes the experts' files of its layers in a folder of its own, with its
own lock and journal, so parts never meet. The join renames the finished files into place and makes the rest. Since
the plan is the same and the files are, the joined checkpoint has the bytes of an undivided conversion.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from nvfp4_prep._util.arguments import FLAG, PATH, RUNNING, SOURCE, TEXT, checked, either, instance
from nvfp4_prep._util.progress import Progress
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.convert import (
    OPTIONS,
    SMOKE,
    ConvertResult,
    check_smoke_policy,
    execute,
)
from nvfp4_prep.commands.part_checks import check_whole, choose_part, finished_entries, part_identity, part_outlines
from nvfp4_prep.commands.preflight import JUDGED_JOIN, PARTS_ANEW, check_place, preflight
from nvfp4_prep.errors import ResumeConflictError
from nvfp4_prep.hub import opened_source
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.output.layer_selection import LayerSelection, list_parts, part_folder
from nvfp4_prep.output.sink import KeepFiles
from nvfp4_prep.output.target import Target
from nvfp4_prep.output.target_checks import has_journal
from nvfp4_prep.pipeline.outputs import Running
from nvfp4_prep.pipeline.runner import Execution
from nvfp4_prep.planning.builder import make_plan
from nvfp4_prep.planning.plan import Plan
from nvfp4_prep.smoke.gate import DEFAULT_SMOKE, SmokeFailedError, SmokePolicy

__all__ = ["PartResult", "convert_part", "join_parts"]

_MADE_ANEW = f"The same command runs it again. To convert anew, {PARTS_ANEW}"


@dataclass(frozen=True)
class PartResult:
    """Result of a part of a conversion.

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


@checked(
    source=SOURCE,
    target=PATH,
    layers=either(TEXT, instance(LayerSelection)),
    options=OPTIONS,
    restart=FLAG,
    **RUNNING,
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
    """Prepare some of the layers, for :func:`join_parts`. If it is killed, the same call continues.

    Any number of parts may run at once, on any machines that see source and target. Parts may overlap: the bytes are
    the same. Peak memory as for :func:`~nvfp4_prep.commands.convert.convert`.

    Args:
        source: a directory, or an opened source; the same for all parts.
        target: the whole conversion's output directory.
        layers: which, as :meth:`LayerSelection.parse` takes it: ``1-20``, ``3,7-9``, ``2/8``.
        options: the same for all parts.
        threads: workers; does not change the output.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: receives the counts of bytes.
        restart: discard this part's unfinished earlier run.

    Raises:
        UsageError: if no MoE layer is selected.
        ResumeConflictError: if the target is being joined or converted as a whole.
        BusyError: if the same part is at work elsewhere.
        NvfpPrepError: as :func:`~nvfp4_prep.commands.convert.convert`.
    """
    selection = LayerSelection.parse(layers) if isinstance(layers, str) else layers
    path = Path(target)
    with opened_source(source, target=part_folder(path, selection)) as opened:
        check_place(opened, path, selection=selection)
        plan = make_plan(opened, options)
        part = choose_part(plan, selection)
        chosen = selection.choose(layer.index for layer in plan.layers)
        folder = part_folder(path, selection)
        if preflight(plan, opened, path, KeepFiles(), selection=selection, restart=restart) is not None:
            return PartResult(folder, chosen, len(part.files), resumed=False, joined=True, written_nbytes=0)
        with Target.open(folder, part_identity(plan, selection), restart=restart) as new_target:
            running = Running(threads, memory_nbytes, progress)
            written = Execution(part, opened, new_target, KeepFiles()).write(running)
            return PartResult(folder, chosen, len(part.files), new_target.resumed, joined=False, written_nbytes=written)


@checked(source=SOURCE, target=PATH, options=OPTIONS, smoke=SMOKE, **RUNNING)
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
    """Make a whole checkpoint of finished parts. If it is killed, the same call continues.

    Args:
        source, options: the parts'.
        target: the output directory that was given for the parts.
        threads: workers.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: receives the counts of bytes.
        smoke: as for :func:`~nvfp4_prep.commands.convert.convert`.

    Raises:
        PartsMissingError: if layers are missing; nothing was changed.
        BusyError: if a part is at work.
        ResumeConflictError: if a part was made from another source, with other options or by another version.
        VerificationError: if two parts made the same file with different bytes.
        NvfpPrepError: as :func:`~nvfp4_prep.commands.convert.convert`.
    """
    path = Path(target)
    with contextlib.ExitStack() as held:
        opened = held.enter_context(opened_source(source, target=path))
        check_place(opened, path, join=True)
        plan = make_plan(opened, options)
        check_smoke_policy(smoke, plan)
        complete = preflight(plan, opened, path, KeepFiles(), join=True)
        if complete is not None:
            return ConvertResult.of(plan, path, complete, None)
        new_target = _hold_parts(held, plan, path)
        execution = Execution(plan, opened, new_target, KeepFiles())
        try:
            return execute(execution, plan, new_target, Running(threads, memory_nbytes, progress), smoke)
        except (SmokeFailedError, ResumeConflictError) as error:  # whose advice is --restart, which a join has not
            error.next_step = _MADE_ANEW if smoke is not None else JUDGED_JOIN
            raise


def _hold_parts(held: contextlib.ExitStack, plan: Plan, path: Path) -> Target:
    """Return the opened target with the files of all parts; it and they stay locked until ``held`` is closed."""
    parts = []
    for text, folder in list_parts(path).items():
        selection = LayerSelection.parse(text)
        part = held.enter_context(Target.open(folder, part_identity(plan, selection)))
        outlines = part_outlines(plan, selection)
        part.check_names(outlines, outlines)  # the rest of the folder goes when the join is done
        parts.append(part)
    entries = finished_entries({part.path: part.done for part in parts})
    if not has_journal(path):  # else a join was begun, when nothing was missing
        check_whole(plan, entries, path)
    target = held.enter_context(Target.open(path, plan.identity()))
    for part in parts:
        for name, entry in part.done.items():
            if name not in target.done:
                target.adopt(entry, part)
    return target
