"""Execution of a plan on a target: the jobs, their order, the source's shards, and the files made at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from nvfp4_prep._util.steps import step
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.moe.scalars import expert_scale_vectors
from nvfp4_prep.output.sink import FileSink
from nvfp4_prep.output.target import Target
from nvfp4_prep.pipeline.copy_jobs import passthrough_job, side_file_job, values_job
from nvfp4_prep.pipeline.engine import Hooks
from nvfp4_prep.pipeline.expert_jobs import experts_job, source_block_scales_job
from nvfp4_prep.pipeline.finish import write_made_files
from nvfp4_prep.pipeline.jobs import FileJob, JobResult
from nvfp4_prep.pipeline.outlines import plan_outlines
from nvfp4_prep.pipeline.outputs import OutputJob, Running, write_outputs
from nvfp4_prep.pipeline.results import draft_manifest, reconciled_sides
from nvfp4_prep.planning.disk_space import room_for
from nvfp4_prep.planning.plan import OutputFile, Plan
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.smoke.gate import FailedScope, SmokePolicy, pass_smoke_run

if TYPE_CHECKING:
    from nvfp4_prep.smoke import SmokeReport

__all__ = ["Execution"]

_CPU = torch.device("cpu")


class Execution:
    """One run of a plan, or of a part of it, on a target."""

    def __init__(self, plan: Plan, source: Source, target: Target, sink: FileSink, device: torch.device = _CPU) -> None:
        """Take over a plan; one with fewer files than the whole has :meth:`write` alone to be called."""
        self._plan = plan
        self._source = source
        self._target = target
        self._sink = sink
        self._device = device
        self._results = {name: JobResult.from_entry(entry) for name, entry in target.done.items()}
        self._shards = _ShardUse(source)
        self._files = {file.name: file for file in plan.files}

    def write(self, running: Running) -> int:
        """Write the files that the journal does not have; return their bytes."""
        plan = self._plan
        scales = [file for file in plan.files if file.kind is FileKind.EXPERT_SCALES]
        first = [file for file in plan.files if file.kind is not FileKind.EXPERT_SCALES]
        pending = [file for file in first if file.name not in self._results]
        self._shards.expect(plan.shard_order(pending), plan.peak_shards_nbytes, pending)
        outputs = [
            *(OutputJob(file.name, file.nbytes, partial(self._job, file)) for file in first),
            *(
                OutputJob(file.name, file.nbytes, partial(side_file_job, file, self._source))
                for file in plan.side_files
            ),
            *(OutputJob(file.name, file.nbytes, partial(self._job, file), last=True) for file in scales),
        ]
        return write_outputs(
            "convert",
            self._target,
            outputs,
            plan_outlines(plan),
            running,
            needed_nbytes=room_for(plan, self._results, self._source, self._sink).needed_nbytes,
            files=1 if self._source.sequential or self._sink.sequential else None,
            hooks=Hooks(
                on_done=self._done,
                before_file=lambda job, stop: self._sink.before_file(job.name, job.nbytes, stop),
                on_stop=self._stop,
            ),
            begin=self._give_finished,
            end=self._sink.drain,
        )

    def _give_finished(self) -> None:
        for name in self._target.done:
            if (self._target.path / name).is_file():
                self._give(self._results[name])

    def _done(self, result: JobResult) -> None:
        self._results[result.name] = result
        file = self._files.get(result.name)
        if file is not None:
            self._shards.used(file)
        self._give(result)

    def _give(self, result: JobResult) -> None:
        self._sink.file_done(result.name, self._target.path / result.name, result.nbytes, result.sha256)

    def _stop(self) -> None:
        self._source.interrupt()
        self._sink.interrupt()

    def _job(self, file: OutputFile) -> FileJob:
        if file.kind is FileKind.PASSTHROUGH:
            return passthrough_job(file, self._source)
        if file.kind is FileKind.EXPERT_SCALES:
            values: dict[str, bytes] = {}
            for position, layer in enumerate(self._plan.layers):
                sides = reconciled_sides(self._plan, position, self._results)
                policy = self._plan.options.gate_up_scales
                values |= expert_scale_vectors(layer.source, layer.layout, policy, layer.scalars, sides)
            return values_job(file, values)
        if file.kind is FileKind.SOURCE_SCALES:
            return values_job(file, {key: raw for layer in self._plan.layers for key, raw in layer.scalars.raw.items()})
        layer = self._plan.layers[file.layer_position or 0]
        if file.kind is FileKind.EXPERTS:
            return experts_job(layer, file, self._source, self._device)
        return source_block_scales_job(layer, file, self._source)

    def finish(self, smoke: SmokePolicy | None = None) -> tuple[Manifest, SmokeReport | None]:
        """Write index, card, manifest and config, the last two last, and remove the work folder.

        The config is written only after the smoke run passed, and the journal stays until then: a run that was killed
        in it or failed it leaves an unfinished conversion, which the same command takes up at the smoke run.

        Args:
            smoke: what is run; ``None`` runs nothing.

        Raises:
            SourceError: if the source changed since it was planned; nothing that looks whole is left then.
            SmokeFailedError: if the smoke run failed; no config is left then.
        """
        self._source.check_unchanged()
        plan = self._plan
        served = (record for file in plan.files if file.served for record in file.records)
        reports: list[SmokeReport] = []

        def accept(manifest: Manifest) -> None:
            if smoke is None:
                return
            due = [FailedScope.parse(verdict) for verdict in self._target.verdicts]
            with step("smoke test"):
                reports.append(pass_smoke_run(self._target.path, manifest, self._source, smoke, due, self._note_wrong))

        manifest = write_made_files(self._target, draft_manifest(plan, self._results), served, accept)
        return manifest, next(iter(reports), None)

    def _note_wrong(self, scope: FailedScope) -> None:
        self._target.note_wrong(scope.to_json())


class _ShardUse:
    """Countdown of the files that need each source shard, which is released after the last of them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()

    def expect(self, order: Sequence[str], at_once_nbytes: int, files: Iterable[OutputFile]) -> None:
        for file in files:
            for shard in file.shards:
                self._left[shard] = self._left.get(shard, 0) + 1
        self._source.schedule(order, at_once_nbytes)

    def used(self, file: OutputFile) -> None:
        with self._lock:
            finished = []
            for shard in file.shards:
                self._left[shard] -= 1
                if not self._left[shard]:
                    finished.append(shard)
        for shard in finished:
            self._source.release(shard)
