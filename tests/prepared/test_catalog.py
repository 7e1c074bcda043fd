"""The one reader of manifest and headers, over a directory's named files and over a listed source."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.errors import CheckpointError, SourceError
from nvfp4_prep.prepared.catalog import Catalog
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import FileRecord
from nvfp4_prep_kernels import MoeDims
from support.load_files import write_checkpoint

DIMS = MoeDims(3, 128, 256)


def test_a_directory_and_a_listed_source_are_read_alike(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DIMS, layers=(1, 2))
    catalog = Catalog.open(tmp_path)
    with PreparedCheckpoint.open(tmp_path) as checkpoint:
        listed = Catalog.of(tmp_path, checkpoint)
        assert listed == catalog and listed.manifest_sha256 == checkpoint.manifest_sha256 == catalog.manifest_sha256
        for layer in catalog.manifest.layers:
            records = catalog.records(layer)
            assert records == listed.records(layer)
            assert records == {short: checkpoint.tensor_record(layer, short) for short in layer.stored_tensors()}


def test_named_files_are_not_listed(tmp_path: Path) -> None:
    """A server may be given links to another disk, and a directory with things that no conversion wrote."""
    directory, elsewhere = tmp_path / "prepared", tmp_path / "fast"
    directory.mkdir()
    elsewhere.mkdir()
    written = write_checkpoint(directory, DIMS)
    shutil.move(written.file(1), elsewhere / written.file(1).name)
    written.file(1).symlink_to(elsewhere / written.file(1).name)
    os.mkfifo(directory / "pipe")
    catalog = Catalog.open(directory)
    assert set(catalog.records(catalog.layer(1))) == set(written.tensors[1])
    with pytest.raises((CheckpointError, SourceError)):
        PreparedCheckpoint.open(directory)


def test_a_tensor_in_two_files_is_ambiguous(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, DIMS)
    copy = tmp_path / "experts-layer-00001-copy.safetensors"
    shutil.copy(written.file(1), copy)
    listed = written.manifest.files[written.file(1).name]
    layer = replace(written.manifest.layers[0], files=(written.file(1).name, copy.name))
    files = {**written.manifest.files, copy.name: FileRecord(listed.nbytes, listed.sha256, listed.kind)}
    (tmp_path / MANIFEST).write_bytes(replace(written.manifest, layers=(layer,), files=files).to_bytes())
    catalog = Catalog.open(tmp_path)
    with pytest.raises(CheckpointError, match="occurs twice"):
        catalog.records(catalog.layer(1))
