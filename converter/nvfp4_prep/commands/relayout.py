"""Relayout: from one prepared layout to another, without the source.

Experts are read prepared, inverted, checked against what the manifest says of the source, and prepared anew; block
scales that only one of the layouts needs rescaled are rescaled, or are the source's again; everything else is copied.
The result is what ``convert`` of the source with the new options writes, byte for byte in
every tensor file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nvfp4_prep._util.arguments import FLAG, PATH, RUNNING, checked, optional
from nvfp4_prep._util.progress import Progress
from nvfp4_prep._version import __version__
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.commands.preflight import check_apart, check_reachable
from nvfp4_prep.commands.relayout_plan import find_finished_relayout, new_options, other_edits, plan_layers
from nvfp4_prep.layouts import LayoutName
from nvfp4_prep.moe.scalars import expert_scale_vectors
from nvfp4_prep.options import GATE_UP_BLOCK, LAYOUT, MOE_TP, ConvertOptions
from nvfp4_prep.output.experts_fact import ReconciledExpert
from nvfp4_prep.output.finished_output import remove_finished_work
from nvfp4_prep.output.outline import Outline
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.copy_jobs import side_file_job, values_job
from nvfp4_prep.pipeline.finish import made_outlines, write_made_files
from nvfp4_prep.pipeline.jobs import FileJob, JobResult
from nvfp4_prep.pipeline.outputs import OutputJob, Running, write_outputs
from nvfp4_prep.pipeline.relayout_jobs import LayerRelayout, damaged
from nvfp4_prep.pipeline.results import gate_up_record
from nvfp4_prep.planning.output_files import layer_files, scale_files
from nvfp4_prep.planning.plan import LayerPlan, OutputFile
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import FileRecord, GateUpRecord, LayerRecord, Manifest
from nvfp4_prep.prepared.manifest_values import MADE
from nvfp4_prep.prepared.served_config import expected_config
from nvfp4_prep.prepared.structure import require_sound
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["RelayoutResult", "relayout"]


@dataclass(frozen=True)
class RelayoutResult:
    """Result of a relayout.

    Attributes:
        path: the directory.
        manifest: its manifest.
        written_nbytes: bytes written by this run.
        resumed: whether an earlier run's files were kept.
        already_complete: nothing had to be done.
        other_edits: places where the config of an output that was complete already has other recorded edits than the
            checkpoint's: either of them may have been edited since.
    """

    path: Path
    manifest: Manifest
    written_nbytes: int
    resumed: bool
    already_complete: bool = False
    other_edits: tuple[str, ...] = ()


@checked(
    checkpoint=PATH,
    target=PATH,
    layout=optional(LAYOUT),
    gate_up_block=optional(GATE_UP_BLOCK),
    moe_tp=optional(MOE_TP),
    restart=FLAG,
    **RUNNING,
)
def relayout(
    checkpoint: str | Path,
    target: str | Path,
    *,
    layout: LayoutName | None = None,
    gate_up_block: int | None = None,
    moe_tp: int | None = None,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
    restart: bool = False,
) -> RelayoutResult:
    """Write a prepared checkpoint in another layout.

    Streams as ``convert`` does, with the same peak memory; can be killed and continued; every expert's stored bytes are
    checked before they are used, and every source tensor that they are inverted to after.

    Args:
        checkpoint: a prepared checkpoint.
        target: output directory.
        layout, gate_up_block, moe_tp: what shall change, see :class:`ConvertOptions`; the checkpoint's own by default.
        threads: workers; does not change the output.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: receives the counts of bytes.
        restart: discard an unfinished earlier run.

    Raises:
        CheckpointError, VerificationError: if the checkpoint is damaged.
        UnsupportedCheckpointError, UsageError: if its layers have no such layout, or it has this one already.
        TargetError, BusyError, ResumeConflictError, NoSpaceError: if the target cannot take it.
    """
    path = Path(target)
    with PreparedCheckpoint.open(checkpoint) as opened:
        check_reachable(path)
        check_apart(opened.files, path)
        options = new_options(opened.manifest.options, layout, gate_up_block, moe_tp, str(checkpoint))
        require_sound(opened)
        plans = plan_layers(opened, options)
        digest = hashlib.sha256(opened.manifest.to_bytes()).hexdigest()
        identity = {"command": "relayout", "manifest": digest, "options": options.to_dict()}
        finished = find_finished_relayout(opened.manifest, options, plans, path)
        if finished is not None:
            remove_finished_work(path)
            edits = other_edits(opened.manifest, finished)
            return RelayoutResult(path, finished, 0, resumed=False, already_complete=True, other_edits=edits)
        with Target.open(path, identity, restart=restart) as new_target:
            return _Relayout(opened, options, plans, new_target).run(Running(threads, memory_nbytes, progress))


class _Relayout:
    def __init__(
        self, checkpoint: PreparedCheckpoint, options: ConvertOptions, plans: tuple[LayerPlan, ...], target: Target
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._plans = plans
        self._target = target
        self._layers = [
            LayerRelayout(checkpoint, old, new) for old, new in zip(checkpoint.manifest.layers, plans, strict=True)
        ]
        files = layer_files(plans)
        wanted = {FileKind.EXPERTS}
        if any(layer.rescales_anew for layer in self._layers):
            wanted.add(FileKind.SOURCE_BLOCK_SCALES)
        if any(layer.old.layout.scale_vectors != layer.new.layout.scale_vectors for layer in self._layers):
            wanted.add(FileKind.EXPERT_SCALES)
            files += [file for file in scale_files(plans) if file.kind is FileKind.EXPERT_SCALES]
        self._files = {file.name: file for file in files if file.kind in wanted}
        here = {file.name: file for file in checkpoint.files.files()}
        gone = {kind.value for kind in wanted} | {MADE}
        kept = {name for name, file in checkpoint.manifest.files.items() if file.kind not in gone}
        self._copied = {name: here[name] for name in sorted(kept)}

    def run(self, running: Running) -> RelayoutResult:
        # the vectors depend on which side of each expert was rescaled
        files = sorted(self._files.values(), key=lambda file: file.kind is FileKind.EXPERT_SCALES)
        outputs = [
            OutputJob(file.name, file.nbytes, partial(self._job, file), last=file.kind is FileKind.EXPERT_SCALES)
            for file in files
        ]
        outputs += [
            OutputJob(name, file.nbytes, partial(side_file_job, file, self._checkpoint.files))
            for name, file in self._copied.items()
        ]
        needed = write_outputs("relayout", self._target, outputs, self._outlines(), running)
        return RelayoutResult(self._target.path, self._finish(), needed, self._target.resumed)

    def _outlines(self) -> dict[str, Outline]:
        old = self._checkpoint.manifest
        files = {name: Outline(file.nbytes, file.header) for name, file in self._files.items()}
        copied = {name: Outline(file.nbytes) for name, file in self._copied.items()}
        made = made_outlines(self._served, lambda: expected_config(replace(old, options=self._options)))
        return {**files, **copied, **made}

    def _job(self, file: OutputFile) -> FileJob:
        if file.kind is FileKind.EXPERT_SCALES:
            return values_job(file, self._vectors())
        layer = self._layers[file.layer_position or 0]
        return layer.experts_job(file) if file.kind is FileKind.EXPERTS else layer.block_scales_job(file)

    def _vectors(self) -> dict[str, bytes]:
        results = {name: JobResult.from_entry(entry) for name, entry in self._target.done.items()}
        values: dict[str, bytes] = {}
        for position, layer in enumerate(self._layers):
            sides = {outcome.expert: outcome.side.value for outcome in self._outcomes(position, results)}
            sides = sides if layer.rescales_anew else dict(layer.old.gate_up.reconciled)
            policy = self._options.gate_up_scales
            values |= expert_scale_vectors(layer.new.source, layer.new.layout, policy, layer.new.scalars, sides)
        return values

    def _experts_files(self, position: int) -> list[OutputFile]:
        files = self._files.values()
        return [file for file in files if file.kind is FileKind.EXPERTS and file.layer_position == position]

    def _outcomes(self, position: int, results: Mapping[str, JobResult]) -> list[ReconciledExpert]:
        """Return what was done to each expert of a layer whose block scales are rescaled now."""
        facts = (fact for file in self._experts_files(position) for fact in results[file.name].facts)
        return [outcome for fact in facts for outcome in fact.reconciled]

    def _finish(self) -> Manifest:
        """Check the digests, then write index, card, manifest and config, the last two last."""
        results = {name: JobResult.from_entry(entry) for name, entry in self._target.done.items()}
        self._check_copies(results)
        layers = tuple(self._layer_record(position, results) for position in range(len(self._plans)))
        old = self._checkpoint.manifest
        files = {
            name: FileRecord(result.nbytes, result.sha256 or "", self._kind(name))
            for name, result in sorted(results.items())
        }
        draft = replace(
            old,
            tool_version=__version__,
            options=self._options,
            layers=layers,
            files=files,
            verified=(*old.verified[:1], self._verified()),
        )
        return write_made_files(self._target, draft, self._served())

    def _served(self) -> Iterator[TensorRecord]:
        kinds = (FileKind.PASSTHROUGH, FileKind.EXPERT_SCALES)
        served = {name: self._checkpoint.headers[name].tensors for name in self._checkpoint.names(*kinds)}
        served |= {file.name: file.records for file in self._files.values() if file.served}
        return (record for records in served.values() for record in records)

    def _verified(self) -> dict[str, Any]:
        return {
            "check": "relayout",
            "result": "every stored expert matched its checksum and, inverted, the digests of the source's tensors;"
            " every new byte was inverted and compared with the old one before it was written",
            "experts": sum(plan.dims.experts for plan in self._plans),
            "nbytes": sum(plan.prepared_nbytes for plan in self._plans),
            "from": self._checkpoint.manifest.options.to_dict(),
        }

    def _kind(self, name: str) -> str:
        return self._files[name].kind.value if name in self._files else self._checkpoint.manifest.files[name].kind

    def _check_copies(self, results: dict[str, JobResult]) -> None:
        for name in self._copied:
            want = self._checkpoint.manifest.files[name].sha256
            if results[name].sha256 != want:
                what = f"was changed: sha256 {want} expected, {results[name].sha256} found"
                raise damaged(what, str(self._checkpoint.path / name), name)

    def _layer_record(self, position: int, results: dict[str, JobResult]) -> LayerRecord:
        layer, files = self._layers[position], self._experts_files(position)
        old, plan = layer.old, layer.new
        crc32: dict[str, list[int]] = {tensor.value: [] for tensor in PreparedTensor}
        for file in files:
            for fact in results[file.name].facts:
                crc32[fact.tensor.value] += fact.crc32
            for key, digest in results[file.name].digests.items():
                if digest != old.source_sha256[key]:
                    behind = self._checkpoint.file_behind(old, key)
                    raise damaged(f"{key} is not what the source held", old.experts_path, behind)
        return replace(
            old,
            layout=plan.layout,
            gate_up=self._gate_up(layer, self._outcomes(position, results)) if layer.rescales_anew else old.gate_up,
            files=tuple(file.name for file in files),
            expert_crc32={name: tuple(values) for name, values in crc32.items()},
        )

    @staticmethod
    def _gate_up(layer: LayerRelayout, outcomes: list[ReconciledExpert]) -> GateUpRecord:
        return gate_up_record(layer.new, outcomes, layer.old.gate_up.figures.get("relative_error"))
