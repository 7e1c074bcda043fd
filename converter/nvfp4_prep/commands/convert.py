"""Convert: executes a plan and leaves a complete prepared checkpoint, or what the same command can continue."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_prep._util.progress import NoProgress, Progress
from nvfp4_prep._util.system import check_linux
from nvfp4_prep._util.text import count
from nvfp4_prep.checkpoint.filenames import CONFIG, MANIFEST
from nvfp4_prep.checkpoint.small_files import read_small_file
from nvfp4_prep.checkpoint.source import LocalSource, Source
from nvfp4_prep.commands.verify import verify
from nvfp4_prep.errors import ResumeConflictError, TargetError, VerificationError
from nvfp4_prep.options import ConvertOptions, check_type
from nvfp4_prep.output.layer_selection import discard_parts, list_parts
from nvfp4_prep.output.sink import FileSink, KeepFiles
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.device import choose_device
from nvfp4_prep.pipeline.finish import MADE_FILES
from nvfp4_prep.pipeline.runner import Execution
from nvfp4_prep.planning.builder import make_plan
from nvfp4_prep.planning.plan import Plan
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.smoke.gate import DEFAULT_SMOKE, SmokePolicy, pass_smoke_run

if TYPE_CHECKING:
    from nvfp4_prep.smoke import SmokeReport

__all__ = [
    "ConvertResult",
    "check_apart",
    "check_not_divided",
    "check_size",
    "complete_manifest",
    "convert",
    "find_complete",
    "open_source",
    "plan",
    "read_manifest",
]


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion left.

    Attributes:
        path: the prepared checkpoint.
        manifest: its manifest.
        resumed: whether an earlier run's files were kept.
        already_complete: nothing had to be done, by names, sizes, configs and the experts' scalars; no other bytes of
            source and target were read.
        written_nbytes: bytes written by this run.
        left_out, warnings: of the source, where something was to be done: see :class:`~nvfp4_prep.planning.plan.Plan`.
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

    def __repr__(self) -> str:
        return (
            f"ConvertResult({str(self.path)!r}, layers={len(self.manifest.layers)}, resumed={self.resumed},"
            f" already_complete={self.already_complete}, written_nbytes={self.written_nbytes},"
            f" smoke={None if self.smoke is None else self.smoke.result})"
        )


def plan(source: str | Path | Source, options: ConvertOptions | None = None) -> Plan:
    """Plan a conversion without writing anything.

    Args:
        source: a directory, a Hub id, or an opened source.
        options: what the output's bytes depend on.

    Raises:
        SourceError: if the source cannot be read.
        UnsupportedCheckpointError: if it must be refused.
    """
    check_type("options", options, ConvertOptions)
    opened = open_source(source)
    try:
        return make_plan(opened, options)
    finally:
        if opened is not source:
            opened.close()


def check_arguments(options: object, threads: object, smoke: object) -> None:
    """Raise :class:`UsageError` for arguments of other types, before anything is written."""
    check_type("options", options, ConvertOptions)
    check_type("threads", threads, int)
    check_type("smoke", smoke, SmokePolicy)


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

    Every prepared byte is turned back and compared with the source before it is written. Killed at any moment, the
    same call continues and ends with the same bytes. Peak memory does not depend on the checkpoint's size (see
    :mod:`nvfp4_prep.pipeline.engine`).

    Args:
        source: a directory, a Hub id, or an opened source.
        target: output directory; made if it does not exist.
        options: what the output's bytes depend on.
        threads: workers; does not change the output.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: told how it goes.
        restart: discard an unfinished earlier run instead of continuing it.
        sink: takes every finished file, also those that an earlier run finished.
        device: ``cpu`` or ``cuda``: where the layout is applied; does not change the output.
        smoke: what the smoke run before the config is written runs; ``None`` leaves it out.
        smoke_again: run it also on what was complete already.

    Raises:
        SourceError, UnsupportedCheckpointError: as :func:`plan`.
        TargetError, BusyError, ResumeConflictError, NoSpaceError: if the target cannot take it.
        VerificationError: if a prepared byte does not turn back into the source's.
        SmokeFailedError: if the smoke run failed; the same call runs it again, and no config is there until it passes.
        ConversionInterrupted: on Ctrl-C; what is finished stays.
    """
    check_arguments(options, threads, smoke)
    where = choose_device(device)
    path = Path(target)
    opened = open_source(source, path)
    try:
        check_apart(opened, path)
        if not restart:
            check_not_divided(path)
        made = make_plan(opened, options)
        taker = sink or KeepFiles()
        sizes = {file.name: file.nbytes for file in made.files} | {file.name: file.nbytes for file in made.side_files}
        taker.begin(made.source_label, made.source_revision, made.options, {**sizes, **dict.fromkeys(MADE_FILES, 0)})
        complete = complete_manifest(path, made, taker)
        if complete is not None:
            report = pass_smoke_run(path, complete, opened, smoke) if smoke is not None and smoke_again else None
            return ConvertResult(
                path, complete, False, True, 0, left_out=made.left_out, warnings=made.warnings, smoke=report
            )
        if restart:
            discard_parts(path)
        with Target(path, made.identity(), restart=restart, elsewhere=taker.holds) as place:
            execution = Execution(made, opened, place, taker, where)
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


def open_source(source: str | Path | Source, target: Path | None = None) -> Source:
    """Open a directory or, where none has that name, a Hub id (``ORG/NAME``, ``hf://…``); an opened source stays as is.

    Args:
        source: as the user gave it.
        target: the conversion's, whose work folder takes downloads.

    Raises:
        SourceError, HubError, UsageError: if it cannot be read.
    """
    check_linux()
    if not isinstance(source, str | Path):
        return source
    if isinstance(source, str):
        from nvfp4_prep.hub import open_source as open_address

        named = open_address(source, target=target)
        if not isinstance(named, str):
            return named
    return LocalSource(Path(source))


def check_apart(source: Source, target: Path) -> None:
    """Raise :class:`TargetError` if target and source directory are the same or one lies in the other."""
    root = getattr(source, "root", None)
    if not isinstance(root, Path):
        return
    resolved = Path(os.path.realpath(target))
    if resolved == root or resolved.is_relative_to(root) or root.is_relative_to(resolved):
        raise TargetError(
            "target and source are the same directory or one lies in the other",
            where=str(target),
            next_step="Give a target outside the source: the source is never touched.",
        )


def check_not_divided(path: Path) -> None:
    """Raise :class:`ResumeConflictError` if parts of a conversion work there."""
    parts = list_parts(path)
    if parts:
        raise ResumeConflictError(
            f"holds parts made with --layers {', '.join(parts)}",
            where=str(path),
            next_step="Join them with --join, or discard them with --restart.",
        )


def complete_manifest(path: Path, made: Plan, sink: FileSink) -> Manifest | None:
    """As :func:`find_complete`; removes what a kill in the last moment of that conversion left."""
    manifest = find_complete(path, made, sink)
    if manifest is not None:
        Target.remove_finished_work(path)
    return manifest


def find_complete(path: Path, made: Plan, sink: FileSink) -> Manifest | None:
    """Return the manifest, if the target is already what the plan would make; ``None`` if it is not finished.

    Raises:
        TargetError: if it is a finished conversion of something else, or its files are not all there.
        VerificationError: if it is damaged otherwise, by manifest, stamp, sizes, headers and index.
    """
    if not (path / MANIFEST).is_file() or not (path / CONFIG).is_file() or Target.has_journal(path):
        return None
    manifest = read_manifest(path)
    differences = _differences(manifest, made)
    if differences:
        raise TargetError(
            f"holds a finished conversion of something else or with other options: {'; '.join(differences)}",
            where=str(path),
            next_step="Give another target, or remove it.",
        )
    if not _is_of_this_source(manifest, made):
        raise TargetError(
            "holds a finished conversion of something else: its source had the same name, but other tensors or configs",
            where=str(path),
            next_step="Give another target, or remove it.",
        )
    all_here = True
    for file in made.files:
        there, sha256 = path / file.name, manifest.files[file.name].sha256
        if not sink.holds(file.name, file.nbytes, sha256):
            check_size(there, file.nbytes)
        all_here = all_here and there.is_file()
    if all_here:  # of files that were published and deleted, the Hub's listing is compared when publishing ends
        _check_undamaged(path)
    return manifest


def _check_undamaged(path: Path) -> None:
    """Raise :class:`VerificationError` if a finished target is damaged, as far as that shows without tensor bytes."""
    report = verify(path, quick=True)
    if report.problems:
        rest = len(report.problems) - 1
        more = f" (and {count(rest, 'more problem')})" if rest else ""
        raise VerificationError(
            f"was converted before, but is damaged: {report.problems[0]}{more}",
            where=str(path),
            next_step=report.next_step,
        )


def _is_of_this_source(manifest: Manifest, made: Plan) -> bool:
    """By configs, files and scalars, which is what was read of the source. Experts that were tuned and quantized anew
    have other scalars; a source that differs in other tensors' values only is not told apart."""
    records = {file.name: manifest.files.get(file.name) for file in made.files}
    sizes = {name: None if record is None else record.nbytes for name, record in records.items()}
    side = {name: record.nbytes for name, record in manifest.files.items() if record.kind == "side"}
    digests = {key: digest for layer in manifest.layers for key, digest in layer.source_sha256.items()}
    raw = {key: value for layer in made.layers for key, value in layer.scalars.raw.items()}
    return (
        dict(manifest.texts) == dict(made.index.texts)
        and sizes == {file.name: file.nbytes for file in made.files}
        and side == {file.name: file.nbytes for file in made.side_files}
        and all(digests.get(key) == hashlib.sha256(value).hexdigest() for key, value in raw.items())
    )


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a finished target; raises :class:`TargetError` if it cannot be read."""
    raw = read_small_file(path / MANIFEST, TargetError, "Give another target, or remove it.")
    return Manifest.from_bytes(raw, str(path / MANIFEST))


def check_size(path: Path, nbytes: int) -> None:
    """Raise :class:`TargetError` if a file of a finished output is missing or has another size."""
    try:
        status = path.lstat()
        found = status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError:
        found = None
    if found != nbytes:
        raise TargetError(
            "a file of a finished output is missing or damaged",
            where=str(path),
            expected=f"{nbytes} bytes",
            actual="nothing" if found is None else f"{found} bytes",
            next_step="Remove the directory and run the command again; nvfp4-prep verify says what else is wrong.",
        )


def _differences(manifest: Manifest, made: Plan) -> list[str]:
    """What a finished conversion is and was not asked for, one text each."""
    found = {"source": manifest.source, "revision": manifest.revision, **manifest.options.to_dict()}
    asked = {"source": made.source_label, "revision": made.source_revision, **made.options.to_dict()}
    return [f"{key} is {found.get(key)}, requested {asked[key]}" for key in asked if found.get(key) != asked[key]]
