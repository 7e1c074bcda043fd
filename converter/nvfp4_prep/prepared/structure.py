"""The quick checks of a prepared checkpoint: everything but the tensors' bytes."""

from __future__ import annotations

import hashlib
from collections import Counter

from nvfp4_prep._util.text import count
from nvfp4_prep.checkpoint.filenames import (
    CONFIG,
    EXPERT_SCALES,
    INDEX,
    MANIFEST,
    README,
    SOURCE_SCALES,
    FileKind,
    restored_shards,
)
from nvfp4_prep.checkpoint.lfs_pointer import LFS_MAX_NBYTES, LFS_NEXT_STEP, is_lfs_pointer
from nvfp4_prep.errors import CheckpointError, NvfpPrepError, OpenFilesError, VerificationError
from nvfp4_prep.moe.layers import SOURCE_BLOCK_SCALE
from nvfp4_prep.moe.scalars import known_format
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint
from nvfp4_prep.prepared.manifest_checks import check_manifest
from nvfp4_prep.prepared.manifest_values import MADE, SIDE
from nvfp4_prep.prepared.problems import FOREIGN, Problems, steps_for
from nvfp4_prep.prepared.served_config import FOREIGN_CODE, RESTAMP, STAMP, read_served_config
from nvfp4_prep_kernels import PreparedTensor

__all__ = ["check_structure", "raise_damaged", "require_sound"]

_SERVED = (FileKind.EXPERTS, FileKind.PASSTHROUGH, FileKind.EXPERT_SCALES)


def check_structure(checkpoint: PreparedCheckpoint, problems: Problems, *, with_config: bool = True) -> None:
    """Check manifest, stamp, files, sizes, headers, index, and the digests of the small files.

    Args:
        checkpoint: what to check.
        problems: takes what is wrong.
        with_config: look at ``config.json`` too.

    Raises:
        UnsupportedCheckpointError: if its source's format is of a package that is not installed, which is not damage.
    """
    for layer in checkpoint.manifest.layers:
        known_format(layer.source)
    if not checkpoint.manifest.layers:
        problems.add(MANIFEST, "names no prepared layers")
    _check_files(checkpoint, problems)
    for name, error in checkpoint.header_errors.items():
        if checkpoint.sizes.get(name) == checkpoint.manifest.files[name].nbytes:  # another size says it already
            problems.add(name, error.what, error.expected, error.actual)
    if with_config:
        _check_config(checkpoint, problems)
    if not problems.found:
        _check_tensors(checkpoint, problems)
    if problems.found:
        return
    check_manifest(checkpoint, problems)
    try:
        for layer in checkpoint.manifest.layers:
            for tensor in layer.stored_tensors():
                record = checkpoint.tensor_record(layer, tensor)
                if tensor in layer.expert_crc32 and record.file not in layer.files:
                    problems.add(record.file, f"tensor {record.name!r} is in the wrong file", ", ".join(layer.files))
            checkpoint.scalars(layer)
        _check_index(checkpoint, problems)
    except NvfpPrepError as error:
        problems.add_error(str(checkpoint.path), error)


def require_sound(checkpoint: PreparedCheckpoint) -> None:
    """Raise :class:`VerificationError` with the first problem of :func:`check_structure`, before any work."""
    problems = Problems()
    check_structure(checkpoint, problems)
    raise_damaged(checkpoint, problems)


def raise_damaged(
    checkpoint: PreparedCheckpoint, problems: Problems, kind: type[NvfpPrepError] = VerificationError
) -> None:
    """Raise the first problem as an error of type ``kind``, with what helps against all of them."""
    if problems.found:
        raise kind(
            f"is damaged: {problems.found[0]}",
            where=str(checkpoint.path),
            next_step=steps_for(problems.found, checkpoint.manifest.files, str(checkpoint.path)),
        )


def _check_files(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    there, listed = checkpoint.sizes, checkpoint.manifest.files
    for name, file in listed.items():
        if name == CONFIG:
            continue  # _check_config knows what it must say
        if any(part.startswith(".") for part in name.split("/")):
            problems.add(name, "is listed and has a hidden name, which no conversion copies: the manifest is forged")
        elif name not in there:
            problems.add(name, "is missing")
        elif there[name] != file.nbytes:
            pointer = there[name] <= LFS_MAX_NBYTES and is_lfs_pointer(checkpoint.files.peek(name, 0, there[name]))
            what = "is a git-lfs pointer, not the file itself" if pointer else "has the wrong size"
            step = LFS_NEXT_STEP if pointer else None
            problems.add(name, what, f"{file.nbytes} bytes", f"{there[name]} bytes", step)
        elif file.kind == MADE:
            _check_made(checkpoint, name, file.sha256, problems)
    for name in sorted(there.keys() - listed.keys() - {MANIFEST, CONFIG}):
        problems.add(name, "does not belong to this checkpoint: the manifest does not name it", next_step=FOREIGN)
    for name in {INDEX, README, CONFIG} - listed.keys():
        problems.add(MANIFEST, f"does not name {name}")
    _check_kinds(checkpoint, problems)
    _check_restorable(checkpoint, problems)


def _check_restorable(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    """Find copied files whose names restore needs for its own: no conversion writes such a checkpoint."""
    manifest = checkpoint.manifest
    count = len(manifest.layers) + sum(file.kind == FileKind.PASSTHROUGH for file in manifest.files.values())
    taken = restored_shards(count) | {*manifest.texts, INDEX}
    for name, file in manifest.files.items():
        if file.kind == SIDE and (name in taken or name.split("/")[0] in taken):
            problems.add(name, "has the name of a file that restore writes: the manifest is forged or damaged")


def _check_made(checkpoint: PreparedCheckpoint, name: str, sha256: str, problems: Problems) -> None:
    try:
        digest = hashlib.sha256(checkpoint.read_file(name)).hexdigest()
    except CheckpointError as error:
        problems.add(name, error.what, error.expected, error.actual)
        return
    if digest != sha256:
        problems.add(name, "was changed", f"sha256 {sha256}", digest)


def _check_kinds(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    """Check that each file of tensors is of the kind that its layer or its name says, so that none is passed over."""
    manifest = checkpoint.manifest
    experts = Counter(name for layer in manifest.layers for name in layer.files)
    if set(experts) != set(checkpoint.names(FileKind.EXPERTS)) or any(times > 1 for times in experts.values()):
        problems.add(MANIFEST, "files of kind experts are not those of the layers, each once")
    for kind, only in ((FileKind.EXPERT_SCALES, EXPERT_SCALES), (FileKind.SOURCE_SCALES, SOURCE_SCALES)):
        if checkpoint.names(kind) != [only]:
            problems.add(MANIFEST, f"must name one file of kind {kind}, {only}")


def _check_tensors(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    """Check that files of the experts hold their tensors and no others: a server would load whatever the index names.

    And no two tensors of the source have one name, or restore would write only one of them.
    """
    twice = [name for name, times in Counter(checkpoint.source_tensor_names()).items() if times > 1]
    if twice:
        problems.add(MANIFEST, f"source tensor {min(twice)!r} occurs twice ({count(len(twice), 'such tensor')})")
    layers = checkpoint.manifest.layers
    expected = {
        FileKind.EXPERTS: {layer.prepared_name(tensor) for layer in layers for tensor in PreparedTensor},
        FileKind.EXPERT_SCALES: {
            layer.prepared_name(vector) for layer in layers for vector in layer.layout.scale_vectors
        },
        FileKind.SOURCE_SCALES: {g.key for layer in layers for g in layer.groups if g.leaf.is_scalar},
        FileKind.SOURCE_BLOCK_SCALES: {
            layer.prepared_name(SOURCE_BLOCK_SCALE) for layer in layers if layer.gate_up.reconciled
        },
    }
    for kind, known in expected.items():
        for name in checkpoint.names(kind):
            for record in checkpoint.headers[name].tensors:
                if record.name not in known:
                    problems.add(name, f"tensor {record.name!r} does not belong into a file of kind {kind}")


def _check_config(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    if CONFIG not in checkpoint.sizes:
        problems.add(CONFIG, "is missing")
        return
    try:
        found = read_served_config(checkpoint)
    except OpenFilesError:
        raise
    except NvfpPrepError as error:
        on_config = error.where == str(checkpoint.path / CONFIG)
        problems.add(CONFIG if on_config else error.where or CONFIG, error.what, error.expected, error.actual)
        return
    recorded = checkpoint.manifest.files.get(CONFIG)
    if found.stamp:
        problems.add(CONFIG, f"its stamp was edited: {', '.join(found.stamp)}", next_step=STAMP)
    if found.code:
        problems.add(CONFIG, f"was edited to load code: {', '.join(found.code)}", next_step=FOREIGN_CODE)
    if found.unrecorded:
        problems.add(CONFIG, f"was edited: {', '.join(found.unrecorded)}", next_step=RESTAMP)
    if found.stamp or found.code or found.unrecorded or recorded is None:
        return
    if (recorded.nbytes, recorded.sha256) == (found.nbytes, found.sha256):
        return
    if found.canonical:
        problems.add(MANIFEST, f"has another size or digest of {CONFIG}", recorded.sha256, found.sha256)
    else:
        problems.add(CONFIG, "was edited; these keys differ: none, only its formatting", next_step=RESTAMP)


def _check_index(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    weight_map = checkpoint.read_json(INDEX).get("weight_map")
    served = {record.name: name for name in checkpoint.names(*_SERVED) for record in checkpoint.headers[name].tensors}
    if not isinstance(weight_map, dict):
        problems.add(INDEX, "has no weight_map")
        return
    for tensor in sorted(served.keys() | weight_map.keys()):
        if served.get(tensor) != weight_map.get(tensor):
            problems.add(INDEX, f"tensor {tensor!r}", served.get(tensor, "no entry"), weight_map.get(tensor, "none"))
