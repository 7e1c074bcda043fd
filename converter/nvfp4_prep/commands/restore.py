"""Restore: a prepared checkpoint back to its source, every tensor equal in name, dtype, shape and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nvfp4_prep._util.arguments import FLAG, PATH, RUNNING, checked
from nvfp4_prep._util.buffers import byte_view
from nvfp4_prep._util.progress import Progress
from nvfp4_prep.checkpoint.filenames import CONFIG, INDEX
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.commands.preflight import check_apart, check_reachable
from nvfp4_prep.commands.restored_files import (
    RestoredFile,
    is_restored,
    plan_restored_files,
    restored_side_files,
    restored_texts,
)
from nvfp4_prep.errors import VerificationError
from nvfp4_prep.moe.layers import ByteRange, TensorGroup
from nvfp4_prep.output.finished_output import remove_finished_work
from nvfp4_prep.output.outline import Outline
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.copy_jobs import copy_units, side_file_job
from nvfp4_prep.pipeline.expert_jobs import expert_chunks
from nvfp4_prep.pipeline.jobs import FileJob, JobResult, Unit, UnitResult
from nvfp4_prep.pipeline.outputs import OutputJob, Running, write_outputs
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.inverse import source_bytes, source_parts
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep.prepared.structure import require_sound
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["RestoreResult", "restore"]


def _renewal_of(file: str) -> str:
    return f"{renewal(file)} Then restore with --restart."


@dataclass(frozen=True)
class RestoreResult:
    """Result of a restore: the directory, its number of tensors and the bytes written by this run.

    ``written_nbytes`` is 0 where the directory was complete already.
    """

    path: Path
    tensors: int
    written_nbytes: int
    resumed: bool
    already_complete: bool = False


@checked(checkpoint=PATH, target=PATH, restart=FLAG, **RUNNING)
def restore(
    checkpoint: str | Path,
    target: str | Path,
    *,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> RestoreResult:
    """Write the source of a prepared checkpoint.

    Tensors are equal in name, dtype, shape and bytes; configs, model card and other files are byte-equal. Only the
    division into shards is our own: one file for each MoE layer, an index always. Every byte is checked on the way:
    the prepared experts against their checksums, the restored tensors against the digests of the source, files that are
    copied against the manifest. Can be killed and continued.

    Args:
        checkpoint: a prepared checkpoint.
        target: output directory.
        threads: workers.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: receives the counts of bytes.
        restart: discard an unfinished earlier run.

    Raises:
        CheckpointError, VerificationError: if the checkpoint is damaged.
        TargetError, BusyError, ResumeConflictError, NoSpaceError: if the target cannot take it.
    """
    path = Path(target)
    with PreparedCheckpoint.open(checkpoint) as opened:
        check_reachable(path)
        check_apart(opened.files, path)
        require_sound(opened)
        digest = hashlib.sha256(opened.manifest.to_bytes()).hexdigest()
        files = plan_restored_files(opened)
        if is_restored(opened, files, path):
            remove_finished_work(path)
            return RestoreResult(
                path, sum(len(file.records) for file in files), 0, resumed=False, already_complete=True
            )
        identity = {"command": "restore", "manifest": digest}
        with Target.open(path, identity, restart=restart, need_sha256=False) as new_target:
            return _Restoration(opened, files, new_target).run(Running(threads, memory_nbytes, progress))


class _Restoration:
    def __init__(self, checkpoint: PreparedCheckpoint, files: list[RestoredFile], target: Target) -> None:
        self._checkpoint = checkpoint
        self._target = target
        self._files = files
        self._side = restored_side_files(checkpoint)

    def run(self, running: Running) -> RestoreResult:
        target = self._target
        self._check_distinct_names()
        outputs = [OutputJob(file.name, file.nbytes, partial(self._job, file)) for file in self._files]
        outputs += [
            OutputJob(name, file.nbytes, partial(side_file_job, file, self._checkpoint.files))
            for name, file in self._side.items()
        ]
        needed = write_outputs("restore", target, outputs, self._outlines(), running)
        self._check_digests()
        target.check_files()
        for name, text in restored_texts(self._checkpoint, self._files).items():
            if name == CONFIG:
                target.check_files()
            target.write_file(name, text)
        target.finish()
        return RestoreResult(target.path, sum(len(file.records) for file in self._files), needed, target.resumed)

    def _outlines(self) -> dict[str, Outline]:
        files = {file.name: Outline(file.nbytes, file.header) for file in self._files}
        side = {name: Outline(file.nbytes) for name, file in self._side.items()}
        texts = restored_texts(self._checkpoint, self._files)
        return {**files, **side, **{name: Outline(whole=partial(bytes, text)) for name, text in texts.items()}}

    def _check_distinct_names(self) -> None:
        """Refuse a checkpoint in which two files would be restored under one name."""
        names = [*(file.name for file in self._files), *self._side, *{*self._checkpoint.manifest.texts, INDEX}]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise VerificationError(
                f"two files would be restored as {twice[0]!r}",
                where=str(self._checkpoint.path),
                next_step="The manifest was forged or damaged: do not trust this checkpoint.",
            )

    def _check_digests(self) -> None:
        """Check that the restored tensors are the source's; else leave nothing that looks whole."""
        copied = {file.name: file.copy_of for file in self._files if file.copy_of} | {name: name for name in self._side}
        for name, original in copied.items():
            want = self._checkpoint.manifest.files[original].sha256
            have = JobResult.from_entry(self._target.done[name]).sha256
            if have != want:
                raise VerificationError(
                    "bytes changed since it was written",
                    where=str(self._checkpoint.path / original),
                    expected=f"sha256 {want}",
                    actual=have,
                    next_step=_renewal_of(original),
                )
        for file in self._files:
            if file.layer is None:
                continue
            digests = JobResult.from_entry(self._target.done[file.name]).digests
            for group in file.layer.groups:
                if digests.get(group.key) != file.layer.source_sha256[group.key]:
                    raise VerificationError(
                        f"restored tensors differ from the source's: {group.key}",
                        where=str(self._target.path / file.name),
                        expected=f"sha256 {file.layer.source_sha256[group.key]}",
                        actual=digests.get(group.key),
                        next_step=_renewal_of(self._checkpoint.file_behind(file.layer, group.key)),
                    )

    def _job(self, file: RestoredFile) -> FileJob:
        if file.layer is None:
            whole = ByteRange(file.copy_of, 0, file.nbytes, file.copy_of)
            return FileJob(file.name, file.nbytes, b"", lambda: copy_units(self._checkpoint.files, [whole], 0))
        units = partial(self._layer_units, file, file.layer)
        return FileJob(file.name, file.nbytes, file.header, units, digest=False)

    def _layer_units(self, file: RestoredFile, layer: LayerRecord) -> Iterator[Unit]:
        places = {record.name: record for record in file.records}
        for tensor in PreparedTensor:
            nbytes = layer.layout.expert_nbytes(tensor, layer.dims)
            for chunk in expert_chunks(layer.dims.experts, nbytes):
                yield Unit(len(chunk) * nbytes, partial(self._restore, layer, tensor, chunk, places))
        yield Unit(1, partial(self._restore_scalars, layer, places))

    def _restore(
        self, layer: LayerRecord, tensor: PreparedTensor, chunk: range, places: dict[str, TensorRecord]
    ) -> UnitResult:
        prepared = self._checkpoint.read_prepared(layer, tensor, chunk)
        for expert in self._checkpoint.damaged_experts(layer, tensor, chunk, prepared):
            raise VerificationError(
                f"expert {expert} of {layer.prepared_name(tensor.value)}: bytes differ from what was written",
                where=str(self._checkpoint.path / self._file_of(layer, tensor)),
                next_step=_renewal_of(self._file_of(layer, tensor)),
            )
        try:
            parts = source_parts(self._checkpoint, layer, tensor, chunk, prepared)
        except ValueError as error:
            raise VerificationError(
                f"{layer.prepared_name(tensor.value)}: {error}",
                where=str(self._checkpoint.path / self._file_of(layer, tensor)),
                next_step=_renewal_of(self._file_of(layer, tensor)),
            ) from error
        result = UnitResult()
        for group, raw in source_bytes(layer, tensor, parts):
            data = byte_view(raw)
            result.pieces += _places(group, chunk, data, layer.dims.experts, places)
            result.digests.append((group.key, data))
        return result

    def _file_of(self, layer: LayerRecord, tensor: PreparedTensor) -> str:
        return self._checkpoint.tensor_record(layer, tensor).file

    def _restore_scalars(self, layer: LayerRecord, places: dict[str, TensorRecord]) -> UnitResult:
        scalars = self._checkpoint.scalars(layer)
        result = UnitResult()
        for group in layer.groups:
            if group.leaf.is_scalar:
                data = memoryview(scalars.raw[group.key])
                experts = layer.dims.experts
                if group.stacked:
                    result.pieces.append((places[group.name(0)].offset_bytes, data))
                else:
                    result.pieces += _places(group, range(experts), data, experts, places)
                result.digests.append((group.key, data))
        return result


def _places(
    group: TensorGroup, chunk: range, data: memoryview, experts: int, places: dict[str, TensorRecord]
) -> list[tuple[int, memoryview]]:
    """Return where the bytes of some experts of one group go in the restored file."""
    nbytes = len(data) // len(chunk)
    if group.stacked:
        return [(places[group.name(0)].offset_bytes + chunk.start * nbytes, data)]
    return [
        (places[group.name(expert)].offset_bytes, data[row * nbytes : (row + 1) * nbytes])
        for row, expert in enumerate(chunk)
    ]
