"""Convert: executes a plan and leaves a complete prepared checkpoint, or what the same command can continue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nvfp4_prep._util.arguments import DEVICE, FLAG, PATH, RUNNING, SOURCE, checked, instance, offering, optional
from nvfp4_prep._util.progress import Progress
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.part_checks import part_outlines
from nvfp4_prep.commands.preflight import check_place, judged_wrong, preflight
from nvfp4_prep.hub import opened_source
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.output.layer_selection import discard_parts
from nvfp4_prep.output.sink import FileSink, KeepFiles
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.device import choose_device
from nvfp4_prep.pipeline.finish import MADE_FILES
from nvfp4_prep.pipeline.outputs import Running
from nvfp4_prep.pipeline.runner import Execution
from nvfp4_prep.planning.builder import make_plan
from nvfp4_prep.planning.plan import Plan
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.smoke.gate import DEFAULT_SMOKE, SmokePolicy, pass_smoke_run

if TYPE_CHECKING:
    from nvfp4_prep.smoke import SmokeReport

__all__ = ["OPTIONS", "SMOKE", "ConvertResult", "check_smoke_policy", "convert", "execute", "plan"]

OPTIONS, SMOKE = optional(instance(ConvertOptions)), optional(instance(SmokePolicy))
SINK = offering("a sink of files", "sequential", "begin", "holds", "room_nbytes", "before_file", "file_done", "drain")


@dataclass(frozen=True)
class ConvertResult:
    """Result of a conversion.

    Attributes:
        path: the prepared checkpoint.
        manifest: its manifest.
        resumed: whether an earlier run's files were kept.
        already_complete: nothing had to be done, by names, sizes, configs and the experts' scalars; no other bytes of
            source and target were read.
        written_nbytes: bytes written by this run.
        left_out, warnings, left_out_reasons: of the source, where something was to be done: see
            :class:`~nvfp4_prep.planning.plan.Plan`.
        smoke: the smoke run's report; ``None`` where none was made.
    """

    path: Path
    manifest: Manifest
    resumed: bool
    already_complete: bool
    written_nbytes: int
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    smoke: SmokeReport | None = None
    left_out_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plan: Plan,
        path: Path,
        manifest: Manifest,
        smoke: SmokeReport | None,
        *,
        run: Target | None = None,
        written_nbytes: int = 0,
    ) -> Self:
        """Return the result for a plan; without a ``run``, of a target that was complete already."""
        return cls(
            path,
            manifest,
            resumed=run is not None and run.resumed,
            already_complete=run is None,
            written_nbytes=written_nbytes,
            left_out=plan.left_out,
            warnings=plan.warnings,
            smoke=smoke,
            left_out_reasons=plan.left_out_reasons,
        )

    def __repr__(self) -> str:
        return (
            f"ConvertResult({str(self.path)!r}, layers={len(self.manifest.layers)}, resumed={self.resumed},"
            f" already_complete={self.already_complete}, written_nbytes={self.written_nbytes},"
            f" smoke={None if self.smoke is None else self.smoke.result})"
        )


@checked(source=SOURCE, options=OPTIONS)
def plan(source: str | Path | Source, options: ConvertOptions | None = None) -> Plan:
    """Plan a conversion without writing anything.

    Args:
        source: a directory, a Hub id, or an opened source.
        options: what the output's bytes depend on.

    Raises:
        SourceError: if the source cannot be read.
        UnsupportedCheckpointError: if it must be refused.
    """
    with opened_source(source, leave_open=True) as opened:
        return make_plan(opened, options)


@checked(
    source=SOURCE,
    target=PATH,
    options=OPTIONS,
    restart=FLAG,
    sink=optional(SINK),
    device=DEVICE,
    smoke=SMOKE,
    smoke_again=FLAG,
    **RUNNING,
)
def convert(
    source: str | Path | Source,
    target: str | Path,
    options: ConvertOptions | None = None,
    *,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
    restart: bool = False,
    sink: FileSink | None = None,
    device: str = "cpu",
    smoke: SmokePolicy | None = DEFAULT_SMOKE,
    smoke_again: bool = False,
) -> ConvertResult:
    """Convert a checkpoint.

    Every prepared byte is inverted and compared with the source before it is written. If it is killed, the
    same call continues and ends with the same bytes. Peak memory does not depend on the checkpoint's size (see
    :mod:`nvfp4_prep.pipeline.engine`).

    Args:
        source: a directory, a Hub id, or an opened source.
        target: output directory; created if it does not exist.
        options: what the output's bytes depend on.
        threads: workers; does not change the output.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: receives the counts of bytes.
        restart: discard an unfinished earlier run instead of continuing it.
        sink: takes every finished file, also those that an earlier run finished.
        device: ``cpu`` or ``cuda``: where the layout is applied; does not change the output.
        smoke: what the smoke run before the config is written runs; ``None`` leaves it out.
        smoke_again: run it also on what was complete already.

    Raises:
        UsageError: if an argument is not what it must be, or the smoke run cannot be made; nothing was written.
        SourceError, UnsupportedCheckpointError: as :func:`plan`.
        TargetError, BusyError, ResumeConflictError, NoSpaceError: if the target cannot take it.
        VerificationError: if a prepared byte cannot be inverted to the source's.
        SmokeFailedError: if the smoke run failed; the same call runs it again, and no config is there until it passes.
        ConversionInterrupted: on Ctrl-C; what is finished stays.
    """
    torch_device, path, used = choose_device(device), Path(target), sink or KeepFiles()
    with opened_source(source, target=path) as opened:
        check_place(opened, path, restart=restart)
        plan = make_plan(opened, options)
        check_smoke_policy(smoke, plan)
        _announce(plan, used)
        complete = preflight(plan, opened, path, used, restart=restart)
        if complete is not None:
            report = pass_smoke_run(path, complete, opened, smoke) if smoke is not None and smoke_again else None
            return ConvertResult.of(plan, path, complete, report)
        with _opened(path, plan, used, restart=restart) as new_target:
            execution = Execution(plan, opened, new_target, used, torch_device)
            return execute(execution, plan, new_target, Running(threads, memory_nbytes, progress), smoke)


def _opened(path: Path, plan: Plan, sink: FileSink, *, restart: bool) -> Target:
    if restart:
        discard_parts(path, partial(part_outlines, plan))
    return Target.open(path, plan.identity(), restart=restart, elsewhere=sink.holds)


def _announce(plan: Plan, sink: FileSink) -> None:
    """Tell the sink of all files that will come; the sizes of those made at the end are not known yet."""
    sizes = {file.name: file.nbytes for file in plan.files} | {file.name: file.nbytes for file in plan.side_files}
    sink.begin(plan.source_label, plan.source_revision, plan.options, {**sizes, **dict.fromkeys(MADE_FILES, 0)})


def check_smoke_policy(smoke: SmokePolicy | None, plan: Plan) -> None:
    """Raise :class:`UsageError` for a smoke run that could not be made once everything is written."""
    if smoke is not None:
        smoke.check({layer.index for layer in plan.layers}, {layer.layout for layer in plan.layers})


def execute(
    execution: Execution,
    plan: Plan,
    target: Target,
    running: Running,
    smoke: SmokePolicy | None,
) -> ConvertResult:
    """Write and finish a whole conversion.

    Raises:
        ResumeConflictError: without a smoke run, where an earlier one found the finished files wrong.
    """
    if smoke is None and target.verdicts:
        raise judged_wrong(target.path, target.verdicts)
    written = execution.write(running)
    manifest, report = execution.finish(smoke)
    return ConvertResult.of(plan, target.path, manifest, report, run=target, written_nbytes=written)
