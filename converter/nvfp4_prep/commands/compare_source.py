"""Comparison of a prepared checkpoint with the source that it was made from, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from nvfp4_prep._util.buffers import byte_view, empty_bytes, same_bytes
from nvfp4_prep._util.text import count
from nvfp4_prep.checkpoint.filenames import MANIFEST, FileKind, quoted
from nvfp4_prep.checkpoint.index import read_index
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.errors import CheckpointError, NvfpPrepError
from nvfp4_prep.moe.config_fit import classify_layers
from nvfp4_prep.moe.expert_bytes import read_experts
from nvfp4_prep.moe.layers import TensorGroup
from nvfp4_prep.pipeline.jobs import UNIT_NBYTES, FileJob, Unit, UnitResult
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.prepared.manifest_values import SIDE
from nvfp4_prep.prepared.problems import FOREIGN, Problems

__all__ = ["SourceComparison"]


class SourceComparison:
    """The source's side of a verification."""

    def __init__(self, checkpoint: PreparedCheckpoint, source: Source, name: str, problems: Problems) -> None:
        """Index the source; raises :class:`SourceError` if it cannot be read."""
        self._checkpoint = checkpoint
        self._name = name
        self._source = source
        self._all_problems = problems
        self._problems = Problems()  # of the comparison; see finish
        self._differing: set[str] = set()
        self._index = read_index(self._source)
        found = classify_layers(self._index)
        self._passed = {finding.experts_path for finding in found.others}
        self._groups = {group.key: group for layer in found.layers for group in layer.groups}
        self._compared: set[str] = set()
        self._compared_files = 0

    @property
    def summary(self) -> str:
        """What was compared so far."""
        return f"{count(len(self._compared), 'tensor')}, configs and {count(self._compared_files, 'other file')}"

    def finish(self) -> None:
        """Hand over what was found: everything, or one line where most tensors differ, for then it is another source.

        Call it once, after all comparisons.
        """
        known = len(self._compared | self._differing)
        if 2 * len(self._differing) > known and len(self._differing) > 1:
            found = self._problems.found
            first = next((it for it in found if it.where.split(", expert ")[0] in self._differing), found[0])
            self._all_problems.add(
                self._name,
                f"is not the source of {self._checkpoint.path}: {len(self._differing)} of {count(known, 'tensor')}"
                f" differ or are missing; the first: {first}",
                next_step=f"Give the source that the manifest names, {quoted(self._checkpoint.manifest.source)}."
                " If this is it, the checkpoint is damaged or wrongly made.",
            )
            return
        for problem in self._problems.found:
            self._all_problems.add(
                problem.where, problem.what, problem.expected, problem.actual, next_step=problem.next_step
            )

    def check_names(self) -> None:
        """Compare the names of tensors, the scalars, the texts and the list of side files."""
        have, want = self._checkpoint.source_names(), set(self._index.tensors)
        for name in want - have:
            self._problems.add(name, "is in the source, but not in the prepared checkpoint")
        for name in have - want:
            self._problems.add(name, "is in the prepared checkpoint, but not in the source")
        self._differing |= want ^ have
        self._check_side_files()
        if self._checkpoint.manifest.passed.keys() != self._passed:
            self._problems.add(MANIFEST, "names other layers than the source's that pass through")
        texts = self._checkpoint.manifest.texts
        for name in sorted(texts.keys() | self._index.texts.keys()):
            if texts.get(name) != self._index.texts.get(name):
                self._problems.add(name, "differs between source and manifest")
        for layer in self._checkpoint.manifest.layers:
            try:
                scalars = self._checkpoint.scalars(layer)
            except NvfpPrepError as error:
                self._problems.add_error(layer.experts_path, error)
                continue
            for group in layer.groups:
                source = self._groups.get(group.key)
                if source is None or not group.leaf.is_scalar:
                    continue
                raw = b"".join(self._source.peek(r.file, r.offset_bytes, r.nbytes) for r in source.records)
                self._compared |= {record.name for record in source.records}
                if raw != scalars.raw[group.key]:
                    self._problems.add(source.records[0].name, "scalars differ from the source's")
                    self._differing |= {record.name for record in source.records}

    def _check_side_files(self) -> None:
        """Compare the files beside the weights.

        A checkpoint with one more is not the source's: code, a chat template or a tokenizer changes what the model
        answers.
        """
        wanted = {file.name: file.nbytes for file in self._index.side_files}
        listed = self._checkpoint.manifest.files
        for name in sorted(name for name, file in listed.items() if file.kind == SIDE and name not in wanted):
            self._problems.add(name, "is not in the source", next_step=FOREIGN)
        for name, nbytes in wanted.items():
            there = listed.get(name)
            if there is None:
                self._problems.add(name, "is in the source, but not in the prepared checkpoint")
            elif there.kind != SIDE:
                self._problems.add(name, f"is of kind {there.kind}, but the source has a file of this name")
            elif there.nbytes != nbytes:
                self._problems.add(name, "has another size in the source", f"{there.nbytes} bytes", f"{nbytes} bytes")

    def compare_experts(self, layer: LayerRecord, group: TensorGroup, chunk: range, raw: torch.Tensor) -> None:
        """Compare the restored bytes of some experts (``uint8 [n, nbytes]``) with the source's."""
        source = self._groups.get(group.key)
        if source is None:
            self._problems.add(group.name(chunk.start), "is not an NVFP4 expert tensor in the source")
            self._differing.update(group.name(expert) for expert in chunk)
            return
        experts = layer.dims.experts
        if (source.dtype, source.shape, source.stacked) != (group.dtype, group.shape, group.stacked):
            self._problems.add(group.name(chunk.start), "has another dtype or shape in the source")
            self._differing.update(group.name(expert) for expert in chunk)
            return
        self._compared.update(group.name(expert) for expert in chunk)
        want = read_experts(self._source, source, chunk, experts)
        if same_bytes(want, raw):
            return
        for row, expert in enumerate(chunk):
            if not torch.equal(want[row], raw[row]):
                position = int((want[row] != raw[row]).nonzero()[0])
                self._differing.add(group.name(expert))
                self._problems.add(f"{group.name(expert)}, expert {expert}", f"differs from byte {position} on")

    def jobs(self) -> list[FileJob]:
        """Return the jobs that compare passed-through tensors and side files."""
        jobs: list[FileJob] = []
        try:
            records = self._checkpoint.records
        except CheckpointError:
            return jobs  # a duplicate tensor: a problem already, and unclear which one is meant
        for name in self._checkpoint.names(FileKind.PASSTHROUGH):
            if name not in self._checkpoint.headers:
                continue  # a problem already
            pairs = [
                (record, self._index.tensors[record.name])
                for record in self._checkpoint.headers[name].tensors
                if record.name in self._index.tensors and records.get(record.name) == record
            ]
            nbytes = sum(record.nbytes for record, _ in pairs)
            jobs.append(self._job(name, nbytes, pairs))
        for file in self._index.side_files:
            here = TensorRecord(file.name, "U8", (file.nbytes,), file.name, 0, file.nbytes)
            there = self._checkpoint.manifest.files.get(file.name)
            found_nbytes = self._checkpoint.sizes.get(file.name)  # on disk, whatever the manifest says
            if there is None or not there.nbytes == found_nbytes == file.nbytes:
                continue  # a problem already
            jobs.append(self._job(file.name, file.nbytes, [(here, here)]))
            self._compared_files += 1
        return jobs

    def _job(self, name: str, nbytes: int, pairs: list[tuple[TensorRecord, TensorRecord]]) -> FileJob:
        return FileJob(f"{name} (source)", nbytes, b"", partial(self._units, pairs), digest=False)

    def _units(self, pairs: list[tuple[TensorRecord, TensorRecord]]) -> Iterator[Unit]:
        for mine, source in pairs:
            if (mine.dtype, mine.shape) != (source.dtype, source.shape):
                self._problems.add(mine.name, "has another dtype or shape in the source")
                self._differing.add(mine.name)
                continue
            if mine.name in self._index.tensors:
                self._compared.add(mine.name)
            for begin in range(0, mine.nbytes, UNIT_NBYTES):
                nbytes = min(UNIT_NBYTES, mine.nbytes - begin)
                yield Unit(nbytes, partial(self._compare, mine, source, begin, nbytes))

    def _compare(self, mine: TensorRecord, source: TensorRecord, begin: int, nbytes: int) -> UnitResult:
        a, b = empty_bytes(nbytes), empty_bytes(nbytes)
        self._checkpoint.files.read_into(mine.file, mine.offset_bytes + begin, byte_view(a))
        self._source.read_into(source.file, source.offset_bytes + begin, byte_view(b))
        if not same_bytes(a, b):
            position = begin + int((a != b).nonzero()[0])
            self._problems.add(mine.name, f"differs from the source from byte {position} on")
            if mine.name in self._index.tensors:
                self._differing.add(mine.name)
        return UnitResult()
