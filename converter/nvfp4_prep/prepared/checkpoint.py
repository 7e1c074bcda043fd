"""Reading a prepared checkpoint: its manifest, its tensors' places, and the way back to the source's bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from nvfp4_prep._util.buffers import byte_view, crc32_each, empty_bytes
from nvfp4_prep.checkpoint.bounded_json import MAX_DEPTH, parse_json
from nvfp4_prep.checkpoint.entry_kind import LINK_STEP
from nvfp4_prep.checkpoint.filenames import CONFIG, HF_QUANT_CONFIG, MANIFEST, FileKind
from nvfp4_prep.checkpoint.local_source import LocalSource
from nvfp4_prep.checkpoint.small_files import MAX_SMALL_NBYTES
from nvfp4_prep.checkpoint.source import Source
from nvfp4_prep.checkpoint.tensors import ShardHeader, TensorRecord
from nvfp4_prep.errors import CheckpointError, SourceError
from nvfp4_prep.moe.layers import SOURCE_BLOCK_SCALE
from nvfp4_prep.moe.scalars import LayerScalars, interpret_scalars
from nvfp4_prep.prepared.catalog import Catalog, records_by_name
from nvfp4_prep.prepared.directory import refusal_of
from nvfp4_prep.prepared.manifest import LayerRecord, Manifest
from nvfp4_prep.prepared.problems import renewal
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["PreparedCheckpoint", "source_configs"]


class PreparedCheckpoint:
    """A directory that ``convert`` wrote; use as a context manager.

    Attributes:
        path: the directory.
        files: its bytes, as a source.
    """

    def __init__(self, path: Path, files: Source) -> None:
        """Read nothing yet; :meth:`open` and :meth:`of` do.

        Args:
            path: the directory, or what to call the files.
            files: its bytes.
        """
        self.path = path
        self.files = files

    @classmethod
    def open(cls, path: str | Path, *, in_work: bool = False) -> Self:
        """Read the manifest of a directory.

        Args:
            path: the directory.
            in_work: whether the run that writes it may still be at work: its last step looks at the rest.

        Raises:
            CheckpointError: if it is not a complete prepared checkpoint.
            SourceError: if it does not exist or cannot be read.
        """
        if (refusal := refusal_of(Path(path), in_work=in_work)) is not None:
            raise refusal
        return cls.of(path, _open_directory(Path(path)))

    @classmethod
    def of(cls, path: str | Path, files: Source) -> Self:
        """Read the manifest among the files of a source, which is closed with this.

        Args:
            path: what to call it.
            files: its bytes.

        Raises:
            CheckpointError: if it is not a complete prepared checkpoint.
            SourceError: if it cannot be read.
        """
        checkpoint = cls(Path(path), files)
        if MANIFEST not in checkpoint.sizes:
            raise CheckpointError(
                f"is not a prepared checkpoint, or its upload is incomplete (no {MANIFEST})",
                where=str(path),
                next_step="Run the push again, or make one with nvfp4-prep convert.",
            )
        _ = checkpoint.catalog
        return checkpoint

    @cached_property
    def catalog(self) -> Catalog:
        """Its manifest and where its tensors lie, over these files."""
        return Catalog.of(self.path, self)

    @property
    def manifest(self) -> Manifest:
        """See :class:`~nvfp4_prep.prepared.manifest.Manifest`."""
        return self.catalog.manifest

    @property
    def manifest_sha256(self) -> str:
        """Digest of the manifest's bytes, which names those of all other files."""
        return self.catalog.manifest_sha256

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file that is there, by name."""
        return {file.name: file.nbytes for file in self.files.files()}

    def read_file(self, name: str) -> bytes:
        """Return a small file, whole.

        Raises:
            CheckpointError: if it is missing, or too large to be what its name says.
            SourceError: if it cannot be read.
        """
        if name not in self.sizes:
            raise CheckpointError("is missing", where=str(self.path / name), next_step=renewal(name))
        if self.sizes[name] > MAX_SMALL_NBYTES:
            raise CheckpointError(
                "is too large",
                where=str(self.path / name),
                expected=f"at most {MAX_SMALL_NBYTES} bytes",
                actual=f"{self.sizes[name]} bytes",
                next_step=renewal(name),
            )
        return self.files.peek(name, 0, self.sizes[name])

    def header(self, name: str) -> ShardHeader:
        """Return the header of a safetensors file; raises :class:`SourceError` if it is missing or malformed."""
        return self.files.header(name)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object that a small file holds; raises as :meth:`read_file`, or if it holds none."""
        return _json_object(self.read_file(name), str(self.path / name), renewal(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()

    def names(self, *kinds: FileKind) -> list[str]:
        """Return files of these kinds, sorted."""
        wanted = {kind.value for kind in kinds}
        return sorted(name for name, file in self.manifest.files.items() if file.kind in wanted)

    @cached_property
    def _read_headers(self) -> tuple[dict[str, ShardHeader], dict[str, SourceError]]:
        headers: dict[str, ShardHeader] = {}
        errors: dict[str, SourceError] = {}
        for name in self.names(*FileKind):
            try:
                headers[name] = self.header(name)
            except SourceError as error:
                if isinstance(error.__cause__, PermissionError):
                    raise  # EACCES says nothing about the file's contents
                errors[name] = error
        return headers, errors

    @property
    def headers(self) -> Mapping[str, ShardHeader]:
        """Headers of the manifest's safetensors files by name, those that can be read."""
        return self._read_headers[0]

    @property
    def header_errors(self) -> Mapping[str, SourceError]:
        """Errors of the others by name: missing or malformed."""
        return self._read_headers[1]

    @cached_property
    def records(self) -> Mapping[str, TensorRecord]:
        """Places of all tensors by name.

        Raises:
            CheckpointError: if a tensor is in two files.
        """
        return records_by_name(self.headers.values(), self.path)

    def record(self, name: str) -> TensorRecord:
        """Return the place of a tensor; raises :class:`CheckpointError` if there is none."""
        try:
            return self.records[name]
        except KeyError:
            raise CheckpointError(f"tensor {name!r} is missing", where=str(self.path)) from None

    def read(self, record: TensorRecord, offset_bytes: int = 0, nbytes: int | None = None) -> torch.Tensor:
        """Return the bytes of a tensor, or of a part of it: ``uint8 [nbytes]``."""
        data = empty_bytes(record.nbytes - offset_bytes if nbytes is None else nbytes)
        self.files.read_into(record.file, record.offset_bytes + offset_bytes, byte_view(data))
        return data

    def tensor_record(self, layer: LayerRecord, tensor: str) -> TensorRecord:
        """Return the place of one of :meth:`~nvfp4_prep.moe.layers.LayerWithLayout.stored_tensors`, checked.

        Raises:
            CheckpointError: if it is missing or of another dtype or shape than the manifest says.
        """
        record = self.record(layer.prepared_name(tensor))
        layer.check_stored(tensor, record, self.path)
        return record

    def read_prepared(self, layer: LayerRecord, tensor: PreparedTensor, chunk: range) -> torch.Tensor:
        """Return prepared bytes of some experts: ``uint8 [len(chunk), rows, bytes per row]``."""
        record = self.tensor_record(layer, tensor)
        nbytes = layer.layout.expert_nbytes(tensor, layer.dims)
        data = self.read(record, chunk.start * nbytes, len(chunk) * nbytes)
        return data.view(len(chunk), *layer.layout.expert_shape(tensor, layer.dims))

    def damaged_experts(
        self, layer: LayerRecord, tensor: PreparedTensor, chunk: range, prepared: torch.Tensor
    ) -> list[int]:
        """Return the experts whose stored bytes have another CRC-32 than when they were written.

        Args:
            layer: the layer.
            tensor: the prepared tensor.
            chunk: numbers of the experts.
            prepared: their bytes, ``uint8 [len(chunk), rows, bytes per row]``.
        """
        wanted = layer.expert_crc32[tensor.value][chunk.start : chunk.stop]
        found = crc32_each(prepared)
        return [expert for expert, want, have in zip(chunk, wanted, found, strict=True) if want != have]

    def file_behind(self, layer: LayerRecord, key: str) -> str:
        """Return the damaged file if a restored tensor is not the source's, though the experts fit their checksums."""
        group = next(group for group in layer.groups if group.key == key)
        if group.leaf.is_scalar:
            return self.record(key).file
        if layer.gate_up.reconciled and group in layer.groups_for(PreparedTensor.W13_WEIGHT_SCALE):
            return self.record(layer.prepared_name(SOURCE_BLOCK_SCALE)).file
        return MANIFEST

    def scalars(self, layer: LayerRecord) -> LayerScalars:
        """Return the source's scalars of a layer.

        Raises:
            CheckpointError: if one is missing or has a wrong size.
        """
        raw: dict[str, bytes] = {}
        for group in layer.groups:
            if not group.leaf.is_scalar:
                continue
            record = self.record(group.key)
            count = 1 if group.shared_scalar else layer.dims.experts * group.scalars_per_expert
            if record.nbytes != 4 * count:
                raise CheckpointError(
                    f"tensor {record.name!r} has the wrong size",
                    where=str(self.path / record.file),
                    expected=f"{4 * count} bytes",
                    actual=f"{record.nbytes} bytes",
                )
            raw[group.key] = bytes(byte_view(self.read(record)))
        return interpret_scalars(layer.source, raw)

    def source_tensor_names(self) -> Iterator[str]:
        """Yield the names of all tensors of the source that this checkpoint says it holds; none should come twice."""
        for layer in self.manifest.layers:
            for group in layer.groups:
                for spec in group.specs(layer.dims.experts):
                    yield spec.name
        for name in self.names(FileKind.PASSTHROUGH):
            if name in self.headers:
                yield from (record.name for record in self.headers[name].tensors)

    def source_names(self) -> set[str]:
        """Return the names of all tensors of the source that this checkpoint holds."""
        return set(self.source_tensor_names())


def _open_directory(path: Path) -> LocalSource:
    try:
        return LocalSource(path)
    except SourceError as error:
        if error.__cause__ is not None:  # the system's answer: no verdict on a checkpoint
            raise
        outside = "leaves the source" in error.what
        raise CheckpointError(
            error.what.replace("leaves the source", "leaves the checkpoint"),
            where=error.where,
            actual=error.actual,
            next_step=LINK_STEP if outside else "It does not belong to a prepared checkpoint: remove it.",
        ) from error


def source_configs(manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the source's ``config.json`` and ``hf_quant_config.json``, as the manifest keeps them.

    Raises:
        CheckpointError: if it does not have the first one, or either is not a JSON object.
    """
    if CONFIG not in manifest.texts:
        raise CheckpointError(f"does not hold the source's {CONFIG}", where=MANIFEST, next_step=renewal(MANIFEST))
    config, quant = manifest.texts[CONFIG], manifest.texts.get(HF_QUANT_CONFIG)
    return (
        _json_object(config, f"{MANIFEST}, the source's {CONFIG}", renewal(MANIFEST)),
        None
        if quant is None
        else _json_object(quant, f"{MANIFEST}, the source's {HF_QUANT_CONFIG}", renewal(MANIFEST)),
    )


def _json_object(raw: bytes, where: str, next_step: str) -> dict[str, Any]:
    value = parse_json(raw, where, CheckpointError, max_depth=MAX_DEPTH, next_step=next_step)
    if not isinstance(value, dict):
        raise CheckpointError("must be a JSON object", where=where, actual=type(value).__name__, next_step=next_step)
    return value
