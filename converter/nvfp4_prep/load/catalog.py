"""A prepared checkpoint on disk: its manifest, and where each prepared tensor lies. Reads headers only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvfp4_prep._util.arguments import PATH
from nvfp4_prep.checkpoint.filenames import CONFIG, EXPERT_SCALES, MANIFEST
from nvfp4_prep.checkpoint.lfs_pointer import LFS_NEXT_STEP
from nvfp4_prep.checkpoint.safetensors_header import ShardHeader, TensorRecord, read_header
from nvfp4_prep.checkpoint.small_files import open_regular, os_error_kind, read_small_file
from nvfp4_prep.errors import CheckpointError, SourceError, UsageError
from nvfp4_prep.prepared.directory import refusal_of
from nvfp4_prep.prepared.manifest import LayerRecord, Manifest
from nvfp4_prep.prepared.problems import renewal

__all__ = ["Catalog"]


@dataclass(frozen=True)
class Catalog:
    """The prepared tensors of a directory that ``convert`` wrote.

    Attributes:
        root: the directory.
        manifest: its manifest.
    """

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path | str) -> Catalog:
        """Read the manifest.

        Raises:
            CheckpointError: if the directory is not a complete prepared checkpoint.
            LoadError: if this process has no descriptors or memory left.
            UsageError: if the argument is not a path.
        """
        folder = PATH.read("argument root", root)
        path = folder / MANIFEST
        try:
            manifest = Manifest.from_bytes(read_small_file(path, CheckpointError, renewal(MANIFEST)), str(path))
            # the config is kept back until the smoke run passed
            os.close(open_regular(folder / CONFIG, CheckpointError, renewal(CONFIG))[0])
        except CheckpointError as error:
            raise refusal_of(folder, absent=CheckpointError) or error from error
        return cls(folder, manifest)

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
                missing or has another shape.
        """
        expected = {spec.name: short for short, spec in layer.stored_tensors().items()}
        found: dict[str, TensorRecord] = {}
        for file in (*layer.files, EXPERT_SCALES):
            for record in self._header(file).tensors:
                if (short := expected.get(record.name)) is not None:
                    layer.check_stored(short, record, self.root)
                    found[short] = record
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
        digest = hashlib.sha256(read_small_file(self.root / file, CheckpointError, renewal(file))).hexdigest()
        if digest != listed.sha256:
            raise CheckpointError(
                "does not have the bytes that were converted",
                where=str(self.root / file),
                expected=f"sha256 {listed.sha256}",
                actual=digest,
                next_step=renewal(file),
            )

    def _header(self, file: str) -> ShardHeader:
        path = self.root / file
        os.close(open_regular(path, CheckpointError, renewal(file))[0])  # not a FIFO, which would be waited for
        try:
            header = read_header(path, file)
        except SourceError as error:
            raise os_error_kind(error.__cause__, CheckpointError)(
                error.what,
                where=str(path),
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
