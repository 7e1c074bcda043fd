"""Verification of a prepared checkpoint: that it is what its manifest says, and inverts to its source.

Three depths. *quick*: manifest, stamp, file list, sizes, headers, index. *full* (the default): also every byte, that
is file digests, the inverse transform of every expert against the digests of the source's tensors, padding, scale
vectors. *with source*: also every tensor, config and side file against the source itself.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from nvfp4_prep._util.arguments import ADDRESS, FLAG, RUNNING, SOURCE, checked, optional
from nvfp4_prep._util.buffers import byte_view, empty_bytes
from nvfp4_prep._util.progress import Progress, default_progress
from nvfp4_prep._util.steps import step
from nvfp4_prep._util.text import count
from nvfp4_prep.checkpoint.filenames import FileKind
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.commands.compare_source import SourceComparison
from nvfp4_prep.commands.verify_report import STRUCTURE, VerifyReport, edited_config_lines
from nvfp4_prep.errors import CheckpointError, NvfpPrepError, UnsupportedCheckpointError, UsageError
from nvfp4_prep.hub import opened_source, parse_address, quiet_client
from nvfp4_prep.moe.gate_up_scales import rescale
from nvfp4_prep.moe.scalars import expert_scale_vectors
from nvfp4_prep.pipeline.engine import Hooks, run_jobs
from nvfp4_prep.pipeline.expert_jobs import expert_chunks
from nvfp4_prep.pipeline.jobs import UNIT_NBYTES, FileJob, JobResult, Unit, UnitResult
from nvfp4_prep.pipeline.working import working
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.inverse import original_block_scales, source_bytes, source_parts
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.prepared.manifest_values import MADE
from nvfp4_prep.prepared.problems import Problems
from nvfp4_prep.prepared.structure import check_structure
from nvfp4_prep_kernels import PreparedTensor, Projection

__all__ = ["verify"]

_OF_LISTING = ("what is published is checked by what the Hub lists", "Leave that out, or verify a download.")
_READS_NONE = ("--quick reads no tensor bytes", "Leave out one of them.")


@checked(checkpoint=ADDRESS, source=optional(SOURCE), quick=FLAG, **RUNNING)
def verify(
    checkpoint: str | Path,
    *,
    source: str | Path | Source | None = None,
    quick: bool = False,
    threads: int | None = None,
    memory_nbytes: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Verify a prepared checkpoint. Never writes.

    A published one is checked by what the Hub lists, as
    :func:`~nvfp4_prep.commands.verify_published.verify_published` does it.

    Args:
        checkpoint: its directory, or where none has that name, a Hub id (``ORG/NAME``, ``hf://…``).
        source: compare with this source too; not with a published checkpoint.
        quick: leave out everything that reads tensors' bytes.
        threads: workers, if tensors' bytes are read.
        memory_nbytes: budget of the buffers, see :func:`~nvfp4_prep.pipeline.engine.run_jobs`.
        progress: receives the counts of bytes.

    Raises:
        UsageError: if an argument is not what it must be, or would do nothing.
        CheckpointError: if the directory is not a prepared checkpoint at all; anything else that is wrong is in the
            report.
        SourceError: if the source that was given cannot be read.
        UnsupportedCheckpointError: if the checkpoint's source was in a format of a package that is not here.
    """
    running = {"--threads": threads, "--memory": memory_nbytes}
    address = parse_address(checkpoint) if isinstance(checkpoint, str) else None
    if address is not None:
        from nvfp4_prep.commands.verify_published import verify_published

        _refuse_unused({"--source": source, "--quick": quick, **running}, _OF_LISTING, str(address))
        quiet_client()
        return verify_published(address)
    if quick:
        _refuse_unused(running, _READS_NONE, str(checkpoint))
    with PreparedCheckpoint.open(checkpoint) as opened, contextlib.ExitStack() as held:
        problems = Problems()
        with step("check of the structure"):
            check_structure(opened, problems.of("structure"))
        checks, nbytes = [STRUCTURE, *edited_config_lines(opened.manifest)], 0
        comparison = None
        if source is not None:
            compared = held.enter_context(opened_source(source, by_ranges=True))
            comparison = SourceComparison(opened, compared, _shown(source, compared), problems.of("source"))
            comparison.check_names()
        if not quick:
            verification = _Verification(opened, problems, comparison)
            nbytes = verification.run(threads, progress or default_progress(), memory_nbytes)
            checks += verification.checks
        if comparison is not None:
            comparison.finish()
            checks.append(f"source: {'names of all tensors; bytes of ' if quick else ''}{comparison.summary}")
        depth = ("quick" if quick else "full") + ("" if comparison is None else " with source")
        found = problems.found
        return VerifyReport(opened.path, opened.manifest, depth, found, tuple(checks), nbytes, opened.manifest_sha256)


def _shown(source: str | Path | Source, opened: Source) -> str:
    """Return the name of an opened source, as the user gave it."""
    return str(source) if isinstance(opened, LocalSource) and opened is not source else opened.label


def _refuse_unused(given: Mapping[str, object], why: tuple[str, str], where: str) -> None:
    """Raise :class:`UsageError` for options that would be ignored, with the reason and what to do instead."""
    unused = [option for option, value in given.items() if value not in (None, False)]
    if unused:
        reason, next_step = why
        raise UsageError(f"{' and '.join(unused)}: {reason}", where=where, next_step=next_step)


class _Verification:
    """The checks that read every byte."""

    def __init__(self, checkpoint: PreparedCheckpoint, problems: Problems, comparison: SourceComparison | None) -> None:
        self._checkpoint = checkpoint
        self._files, self._inversion, self._scales = map(problems.of, ("files", "experts", "scales"))
        self._comparison = comparison
        self._digests: dict[str, str] = {}
        self._inverted: list[tuple[str, int]] = []
        self.checks: list[str] = []

    def run(self, threads: int | None, progress: Progress, memory_nbytes: int | None) -> int:
        manifest = self._checkpoint.manifest
        sizes = self._checkpoint.sizes
        whole = [name for name, file in manifest.files.items() if sizes.get(name) == file.nbytes]
        jobs = [job for name in whole if (job := self._file_job(name)) is not None]
        digested = len(jobs)
        if self._comparison is not None:
            jobs += self._comparison.jobs()
        total = sum(job.nbytes for job in jobs)
        with working(progress, "verify", total):
            run_jobs(
                jobs,
                None,
                threads=threads,
                memory_nbytes=memory_nbytes,
                progress=progress,
                hooks=Hooks(on_done=self._file_done),
            )
        self._check_digests()
        computed = sum([self._check_scales(layer) for layer in manifest.layers])
        done, there = self._experts(), sum(layer.dims.experts for layer in manifest.layers)
        experts = count(done, "expert") if done == there else f"only {done:,} of {count(there, 'expert')}"
        self.checks += [
            f"files: sha256 of {count(digested, 'file')}",
            f"experts: {experts} inverted; digests of the source's tensors, padding and checksums",
            f"scales: global and input scale vectors of {count(computed, 'layer')} computed again{self._rescaled()}",
        ]
        return total

    def _experts(self) -> int:
        """Return the number of experts that were inverted, in all four tensors."""
        done: Counter[str] = Counter()
        for name, experts in self._inverted:
            done[name] += experts
        layers = [record.source for record in self._checkpoint.manifest.layers]
        return sum(min(done[layer.prepared_name(tensor)] for tensor in PreparedTensor) for layer in layers)

    def _rescaled(self) -> str:
        """Return what the layout made of experts whose gate and up have different global scales."""
        layers = [layer.gate_up for layer in self._checkpoint.manifest.layers]
        experts = count(sum(len(layer.reconciled) for layer in layers), "expert")
        rounded = sum(layer.figures.get("rounded", 0) for layer in layers)
        some = any(layer.reconciled for layer in layers)
        return f"; block scales of {experts} rescaled, {rounded:,} of them rounded" if some else ""

    def _file_job(self, name: str) -> FileJob | None:
        file = self._checkpoint.manifest.files[name]
        if file.kind != FileKind.EXPERTS.value:
            return FileJob(name, file.nbytes, b"", partial(self._plain_units, name, 0, file.nbytes))
        try:
            header = self._checkpoint.files.header(name)
        except NvfpPrepError as error:
            self._files.add_error(name, error)
            return None
        raw = self._checkpoint.files.peek(name, 0, header.data_start)
        return FileJob(name, file.nbytes, raw, partial(self._expert_units, name))

    def _plain_units(self, name: str, begin: int, end: int) -> Iterator[Unit]:
        def work(offset: int, nbytes: int) -> UnitResult:
            data = empty_bytes(nbytes)
            self._checkpoint.files.read_into(name, offset, byte_view(data))
            return UnitResult(pieces=[(offset, byte_view(data))])

        for offset in range(begin, end, UNIT_NBYTES):
            nbytes = min(UNIT_NBYTES, end - offset)
            yield Unit(nbytes, partial(work, offset, nbytes))

    def _expert_units(self, name: str) -> Iterator[Unit]:
        """Return units in the file's order. A file whose tensors are not those of its layer is only digested."""
        checkpoint = self._checkpoint
        layer = next((layer for layer in checkpoint.manifest.layers if name in layer.files), None)
        header = checkpoint.files.header(name)
        by_name = {} if layer is None else {layer.prepared_name(tensor): tensor for tensor in PreparedTensor}
        try:
            known = layer is not None and all(
                checkpoint.tensor_record(layer, by_name[record.name]) == record for record in header.tensors
            )
        except (KeyError, NvfpPrepError):
            known = False
        if layer is None or not known:
            self._files.add(name, "does not hold the tensors that the manifest says")
            yield from self._plain_units(name, header.data_start, header.file_nbytes)
            return
        for record in header.tensors:
            tensor = by_name[record.name]
            nbytes = layer.layout.expert_nbytes(tensor, layer.dims)
            for chunk in expert_chunks(layer.dims.experts, nbytes):
                yield Unit(len(chunk) * nbytes, partial(self._check_experts, layer, tensor, chunk))

    def _check_experts(self, layer: LayerRecord, tensor: PreparedTensor, chunk: range) -> UnitResult:
        checkpoint = self._checkpoint
        prepared = checkpoint.read_prepared(layer, tensor, chunk)
        where = layer.prepared_name(tensor.value)
        for expert in checkpoint.damaged_experts(layer, tensor, chunk, prepared):
            self._inversion.add(f"{where}, expert {expert}", "bytes differ from what was written")
        result = UnitResult(pieces=[(0, byte_view(prepared))])
        try:
            parts = source_parts(checkpoint, layer, tensor, chunk, prepared)
            if tensor is PreparedTensor.W13_WEIGHT_SCALE:
                self._check_rescaled(layer, chunk, prepared)
        except (ValueError, CheckpointError, UnsupportedCheckpointError) as error:
            self._inversion.add(f"{where}, experts {chunk.start} to {chunk.stop - 1}", str(error))
            return result
        for group, raw in source_bytes(layer, tensor, parts):
            result.digests.append((group.key, byte_view(raw)))
            if self._comparison is not None:
                self._comparison.compare_experts(layer, group, chunk, raw)
        self._inverted.append((where, len(chunk)))
        return result

    def _check_rescaled(self, layer: LayerRecord, chunk: range, prepared: torch.Tensor) -> None:
        """Check that rescaled block scales are the rounded ones of the kept originals."""
        affected = [(expert, side) for expert, side in layer.gate_up.reconciled if expert in chunk]
        if not affected:
            return
        tensor = PreparedTensor.W13_WEIGHT_SCALE
        stored = dict(
            zip(layer.layout.projections(tensor), layer.layout.invert(tensor, prepared, layer.dims), strict=True)
        )
        scalars = self._checkpoint.scalars(layer)
        for expert, side in affected:
            original = original_block_scales(self._checkpoint, layer, expert)
            gate, up = (scalars.gate_scale_2 or scalars.up_scale_2)[expert], scalars.up_scale_2[expert]
            own, other = (gate, up) if side == Projection.GATE.value else (up, gate)
            again = None if original is None else rescale(original[1], own, other)
            if again is None or not torch.equal(again, stored[Projection(side)][expert - chunk.start]):
                where = f"{layer.prepared_name(tensor.value)}, expert {expert}"
                self._inversion.add(where, f"rescaled {side} block scales do not follow from the source's")

    def _file_done(self, result: JobResult) -> None:
        self._digests |= result.digests
        file = self._checkpoint.manifest.files.get(result.name)
        if file is None or file.kind == MADE:  # check_structure has compared those
            return
        if result.sha256 is not None and result.sha256 != file.sha256:
            self._files.add(result.name, "bytes changed", f"sha256 {file.sha256}", result.sha256)

    def _check_digests(self) -> None:
        for layer in self._checkpoint.manifest.layers:
            for group in layer.groups:
                if group.leaf.is_scalar or group.key not in self._digests:
                    continue
                want, have = layer.source_sha256[group.key], self._digests[group.key]
                if want != have:
                    self._inversion.add(
                        f"{layer.experts_path}, {group.key}",
                        "the inverse transform does not give the source's tensors",
                        f"sha256 {want}",
                        have,
                    )

    def _check_scales(self, layer: LayerRecord) -> bool:
        """Return whether they could be computed again."""
        try:
            scalars = self._checkpoint.scalars(layer)
            for key, raw in scalars.raw.items():
                if hashlib.sha256(raw).hexdigest() != layer.source_sha256[key]:
                    self._scales.add(key, "the kept source scalars changed")
            sides = dict(layer.gate_up.reconciled)
            policy = self._checkpoint.manifest.options.gate_up_scales
            for name, want in expert_scale_vectors(layer.source, layer.layout, policy, scalars, sides).items():
                if bytes(byte_view(self._checkpoint.read(self._checkpoint.record(name)))) != want:
                    self._scales.add(name, "does not follow from the source's scalars")
        except NvfpPrepError as error:
            self._scales.add_error(layer.experts_path, error)
            return False
        return True
