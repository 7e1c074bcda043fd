"""The reader of a prepared checkpoint's manifest, headers and small files; it reads no tensors.

The loader opens the files that it needs by name, at once; :class:`~nvfp4_prep.prepared.checkpoint.PreparedCheckpoint`
gives the files of a listed source instead, and adds the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from nvfp4_prep._util.arguments import PATH
from nvfp4_prep.checkpoint.filenames import CONFIG, EXPERT_SCALES, MANIFEST
from nvfp4_prep.checkpoint.lfs_pointer import LFS_NEXT_STEP
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.checkpoint.small_files import open_regular, os_error_kind, read_small_file
from nvfp4_prep.checkpoint.tensors import ShardHeader, TensorRecord
from nvfp4_prep.errors import CheckpointError, SourceError, UsageError
from nvfp4_prep.prepared.directory import refusal_of
from nvfp4_prep.prepared.manifest import LayerRecord, Manifest
from nvfp4_prep.prepared.problems import renewal

__all__ = ["Catalog", "NamedFiles", "PreparedFiles", "records_by_name"]


class PreparedFiles(Protocol):
    """The files of a prepared checkpoint, by name."""

    def read_file(self, name: str) -> bytes:
        """Return a small file, whole; raise :class:`CheckpointError` if it is missing or too large for its name."""

    def header(self, name: str) -> ShardHeader:
        """Return the header of a safetensors file; raise :class:`SourceError` if it is missing or malformed."""


@dataclass(frozen=True)
class NamedFiles:
    """Files of a directory, opened by their names. Nothing is listed: whatever else is there does not matter."""

    root: Path

    def read_file(self, name: str) -> bytes:
        """See :class:`PreparedFiles`."""
        return read_small_file(self.root / name, CheckpointError, renewal(name))

    def header(self, name: str) -> ShardHeader:
        """See :class:`PreparedFiles`."""
        path = self.root / name
        os.close(open_regular(path, CheckpointError, renewal(name))[0])  # not a FIFO, which would be waited for
        return read_header(path, name)


@dataclass(frozen=True)
class Catalog:
    """The prepared tensors of a directory that ``convert`` wrote.

    Attributes:
        root: the directory.
        manifest: its manifest.
        files: its files; those of ``root`` if left out.
        manifest_sha256: digest of the manifest's bytes, which names those of all other files.
    """

    root: Path
    manifest: Manifest
    files: PreparedFiles | None = field(default=None, repr=False, compare=False)
    manifest_sha256: str = field(default="", repr=False, compare=False)

    @classmethod
    def open(cls, root: Path | str) -> Self:
        """Read the manifest of a directory.

        Raises:
            CheckpointError: if the directory is not a complete prepared checkpoint.
            LoadError: if this process has no descriptors or memory left.
            UsageError: if the argument is not a path.
        """
        folder = PATH.read("argument root", root)
        try:
            catalog = cls.of(folder, NamedFiles(folder))
            # the config is kept back until the smoke run passed
            os.close(open_regular(folder / CONFIG, CheckpointError, renewal(CONFIG))[0])
        except CheckpointError as error:
            raise refusal_of(folder, absent=CheckpointError) or error from error
        return catalog

    @classmethod
    def of(cls, root: Path, files: PreparedFiles) -> Self:
        """Read the manifest among some files.

        Raises:
            CheckpointError: if it is missing or not a manifest.
        """
        raw = files.read_file(MANIFEST)
        return cls(root, Manifest.from_bytes(raw, str(root / MANIFEST)), files, hashlib.sha256(raw).hexdigest())

    @property
    def _files(self) -> PreparedFiles:
        return NamedFiles(self.root) if self.files is None else self.files

    def layer(self, which: int | str) -> LayerRecord:
        """Return a layer by its number, or by its experts' module path where a number is not unique.

        Raises:
            UsageError: if there is no such layer, or more than one.
        """
        if isinstance(which, bool) or not isinstance(which, int | str):
            raise UsageError(
                "is not a layer",
                where="argument layer",
                expected="its number, or its experts' path",
                actual=repr(which)[:80],
            )
        found = [record for record in self.manifest.layers if which in (record.index, record.experts_path)]
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(record.experts_path for record in found)
            raise UsageError(f"layer {which} occurs twice", expected=f"one of {paths}", actual=which)
        numbers = ", ".join(str(record.index) for record in self.manifest.layers)
        raise UsageError(f"no prepared layer {which}", where=str(self.root), expected=f"one of {numbers}")

    def records(self, layer: LayerRecord) -> Mapping[str, TensorRecord]:
        """Return the four big tensors and the scale vectors of a layer, by their short names.

        Raises:
            CheckpointError: if a file is missing, malformed, of another size than the manifest says, or a tensor is
                missing, in two files or of another shape.
        """
        expected = {spec.name: short for short, spec in layer.stored_tensors().items()}
        places = records_by_name(map(self._header, dict.fromkeys((*layer.files, EXPERT_SCALES))), self.root)
        found = {short: places[name] for name, short in expected.items() if name in places}
        for short, record in found.items():
            layer.check_stored(short, record, self.root)
        missing = [name for name, short in expected.items() if short not in found]
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors are missing: {', '.join(missing)}",
                where=str(self.root),
                next_step="Run `nvfp4-prep verify` on the directory.",
            )
        return found

    def check_sha256(self, file: str) -> None:
        """Read a small file whole and compare its digest; raises :class:`CheckpointError` if it differs."""
        listed = self.manifest.files.get(file)
        if listed is None:
            raise CheckpointError(
                f"does not name {file}",
                where=str(self.root / MANIFEST),
                next_step=renewal(MANIFEST),
            )
        digest = hashlib.sha256(self._files.read_file(file)).hexdigest()
        if digest != listed.sha256:
            raise CheckpointError(
                "does not have the bytes that were converted",
                where=str(self.root / file),
                expected=f"sha256 {listed.sha256}",
                actual=digest,
                next_step=renewal(file),
            )

    def _header(self, file: str) -> ShardHeader:
        try:
            header = self._files.header(file)
        except SourceError as error:
            raise os_error_kind(error.__cause__, CheckpointError)(
                error.what,
                where=str(self.root / file),
                expected=error.expected,
                actual=error.actual,
                next_step=error.next_step if error.next_step == LFS_NEXT_STEP else renewal(file),
            ) from error
        listed = self.manifest.files.get(file)
        if listed is None or listed.nbytes != header.file_nbytes:
            raise CheckpointError(
                "file does not fit the manifest",
                where=str(self.root / file),
                expected="no such file" if listed is None else f"{listed.nbytes} bytes",
                actual=f"{header.file_nbytes} bytes",
                next_step=renewal(MANIFEST if listed is None else file),
            )
        return header


def records_by_name(headers: Iterable[ShardHeader], root: Path) -> dict[str, TensorRecord]:
    """Return the places of all tensors of some files by name.

    Args:
        headers: of the files.
        root: directory of the checkpoint, for the message.

    Raises:
        CheckpointError: if a tensor is in two files.
    """
    found: dict[str, TensorRecord] = {}
    for header in headers:
        for record in header.tensors:
            if record.name in found:
                raise CheckpointError(f"tensor {record.name!r} occurs twice", where=str(root / record.file))
            found[record.name] = record
    return found
