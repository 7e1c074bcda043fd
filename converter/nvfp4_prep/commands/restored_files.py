"""Files of a restored checkpoint: their plan, their small texts, and whether a directory has them already."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from nvfp4_prep.checkpoint.filenames import CONFIG, INDEX, FileKind, numbered_shard
from nvfp4_prep.checkpoint.safetensors_header import encode_header
from nvfp4_prep.checkpoint.source import SourceFile
from nvfp4_prep.checkpoint.tensors import TensorRecord
from nvfp4_prep.output.finished_output import has_files
from nvfp4_prep.output.target_checks import has_journal
from nvfp4_prep.pipeline.results import make_index
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.prepared.manifest_values import SIDE

__all__ = ["RestoredFile", "is_restored", "plan_restored_files", "restored_side_files", "restored_texts"]


@dataclass(frozen=True)
class RestoredFile:
    """A layer's file, or the copy of a file of passed-through tensors."""

    name: str
    header: bytes
    records: tuple[TensorRecord, ...]
    nbytes: int
    layer: LayerRecord | None
    copy_of: str


def plan_restored_files(checkpoint: PreparedCheckpoint) -> list[RestoredFile]:
    """Return the files that have tensors: the copied ones first, then one for each MoE layer."""
    passed = checkpoint.names(FileKind.PASSTHROUGH)
    layers = checkpoint.manifest.layers
    count = len(passed) + len(layers)
    files = []
    for number, name in enumerate(passed, 1):
        header = checkpoint.headers[name]
        records = tuple(replace(record, file=numbered_shard(number, count)) for record in header.tensors)
        files.append(RestoredFile(numbered_shard(number, count), b"", records, header.file_nbytes, None, name))
    for number, layer in enumerate(layers, len(passed) + 1):
        groups = sorted(layer.groups, key=lambda group: group.leaf.is_scalar)
        specs = [spec for group in groups for spec in group.specs(layer.dims.experts)]
        header_bytes, records = encode_header(numbered_shard(number, count), specs, {"format": "pt"})
        nbytes = len(header_bytes) + sum(spec.nbytes for spec in specs)
        files.append(RestoredFile(numbered_shard(number, count), header_bytes, records, nbytes, layer, ""))
    return files


def restored_side_files(checkpoint: PreparedCheckpoint) -> dict[str, SourceFile]:
    """Return the files that are copied byte by byte, by name."""
    records = checkpoint.manifest.files
    return {
        file.name: file
        for file in checkpoint.files.files()
        if (record := records.get(file.name)) is not None and record.kind == SIDE
    }


def restored_texts(checkpoint: PreparedCheckpoint, files: list[RestoredFile]) -> dict[str, bytes]:
    """Return the small files in the order of writing: the config is the last."""
    texts = checkpoint.manifest.texts
    index = make_index(record for file in files for record in file.records)
    return {
        INDEX: index,
        **{name: texts[name] for name in sorted(texts.keys() - {INDEX, CONFIG})},
        CONFIG: texts[CONFIG],
    }


def is_restored(checkpoint: PreparedCheckpoint, files: list[RestoredFile], path: Path) -> bool:
    """Return whether a directory is the finished output already: every file by its bytes, and nothing else beside them.
    So a run that was stopped in its very last steps ends well when repeated."""
    if has_journal(path) or not (path / CONFIG).is_file():
        return False
    begins = restored_texts(checkpoint, files) | {file.name: file.header for file in files}
    sizes = {name: len(text) for name, text in begins.items()} | {file.name: file.nbytes for file in files}
    sizes |= {name: file.nbytes for name, file in restored_side_files(checkpoint).items()}
    return has_files(path, sizes, begins) and _has_bytes(checkpoint, files, path)


def _has_bytes(checkpoint: PreparedCheckpoint, files: list[RestoredFile], path: Path) -> bool:
    """Return whether a directory's files have the bytes of this checkpoint's source, all of which are read: another
    checkpoint of the same model differs in nothing else.
    """
    wanted = {file.name: file.copy_of for file in files if file.copy_of} | {
        name: name for name in restored_side_files(checkpoint)
    }
    for name, original in wanted.items():
        with (path / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != checkpoint.manifest.files[original].sha256:
                return False
    return all(_has_layer(file, file.layer, path) for file in files if file.layer is not None)


def _has_layer(file: RestoredFile, layer: LayerRecord, path: Path) -> bool:
    places = {record.name: record for record in file.records}
    with (path / file.name).open("rb") as stream:
        for group in layer.groups:
            digest = hashlib.sha256()
            for spec in group.specs(layer.dims.experts):
                stream.seek(places[spec.name].offset_bytes)
                digest.update(stream.read(places[spec.name].nbytes))
            if digest.hexdigest() != layer.source_sha256[group.key]:
                return False
    return True
