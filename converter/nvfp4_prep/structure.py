"""The quick checks of a prepared checkpoint: everything but the tensors' bytes."""

from __future__ import annotations

import hashlib

from nvfp4_prep.errors import NvfpPrepError, VerificationError
from nvfp4_prep.index import CONFIG, HF_QUANT_CONFIG, INDEX, read_json_file
from nvfp4_prep.manifest import MANIFEST, LayerRecord, Manifest
from nvfp4_prep.manifest_checks import changed_keys, check_manifest
from nvfp4_prep.plan_data import FileKind
from nvfp4_prep.prepared import PreparedCheckpoint
from nvfp4_prep.problems import Problems
from nvfp4_prep.scalars import known_format
from nvfp4_prep.stamp import stamped_config
from nvfp4_prep_kernels import SCALE_VECTORS, PreparedTensor

__all__ = ["check_structure", "expected_config", "require_sound"]

_SERVED = (FileKind.EXPERTS, FileKind.PASSTHROUGH, FileKind.EXPERT_SCALES)


def expected_config(manifest: Manifest) -> bytes:
    """The ``config.json`` that belongs to a manifest."""
    quant = manifest.texts.get(HF_QUANT_CONFIG)
    return stamped_config(
        read_json_file(CONFIG, manifest.texts[CONFIG]),
        None if quant is None else read_json_file(HF_QUANT_CONFIG, quant),
        manifest.options,
        gated=any(layer.layer.gated for layer in manifest.layers),
    )


def check_structure(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    """Manifest, stamp, files, sizes, headers, index, and the digests of the small files.

    Raises:
        UnsupportedCheckpointError: if its source's format is of a package that is not here, which is no damage.
    """
    for layer in checkpoint.manifest.layers:
        known_format(layer.layer)
    if not checkpoint.manifest.layers:
        problems.add(MANIFEST, "names no prepared layers")
    _check_files(checkpoint, problems)
    for name, error in checkpoint.header_errors.items():
        if checkpoint.sizes.get(name) == checkpoint.manifest.files[name].nbytes:  # another size says it already
            problems.add(name, error.what, error.expected, error.actual)
    _check_config(checkpoint, problems)
    if problems.found:
        return
    check_manifest(checkpoint, problems)
    try:
        for layer in checkpoint.manifest.layers:
            for tensor in PreparedTensor:
                record = checkpoint.tensor_record(layer, tensor)
                if record.file not in layer.files:
                    problems.add(record.file, f"tensor {record.name!r} is in the wrong file", ", ".join(layer.files))
            _check_vectors(checkpoint, layer, problems)
            checkpoint.scalars(layer)
        _check_index(checkpoint, problems)
    except NvfpPrepError as error:
        problems.add_error(str(checkpoint.path), error)


def require_sound(checkpoint: PreparedCheckpoint) -> None:
    """Raises :class:`VerificationError` with the first problem of :func:`check_structure`, before any work."""
    problems = Problems()
    check_structure(checkpoint, problems)
    if problems.found:
        raise VerificationError(
            f"is damaged: {problems.found[0]}",
            where=str(checkpoint.path),
            next_step="Run nvfp4-prep verify for all problems.",
        )


def _check_files(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    there = checkpoint.sizes
    for name, file in checkpoint.manifest.files.items():
        if name == CONFIG:
            continue  # _check_config knows what it must say
        if name not in there:
            problems.add(name, "is missing")
        elif there[name] != file.nbytes:
            problems.add(name, "has the wrong size", f"{file.nbytes} bytes", f"{there[name]} bytes")
        elif file.kind == "made":
            digest = hashlib.sha256(checkpoint.files.peek(name, 0, file.nbytes)).hexdigest()
            if digest != file.sha256:
                problems.add(name, "was changed", f"sha256 {file.sha256}", digest)
    for name in sorted(there.keys() - checkpoint.manifest.files.keys() - {MANIFEST}):
        if name.endswith((".safetensors", ".json")):
            problems.add(name, "does not belong to this checkpoint: the manifest does not name it")


def _check_config(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    try:
        raw = checkpoint.read_file(CONFIG)
        expected = expected_config(checkpoint.manifest)
        if raw != expected:
            changed = changed_keys(read_json_file(CONFIG, expected), read_json_file(CONFIG, raw))
            problems.add(CONFIG, f"differs from what was converted in {', '.join(changed) or 'its formatting'}")
        elif (file := checkpoint.manifest.files.get(CONFIG)) is not None:
            digest = hashlib.sha256(raw).hexdigest()
            if (file.nbytes, file.sha256) != (len(raw), digest):
                problems.add(MANIFEST, f"has another size or digest of {CONFIG}", file.sha256, digest)
    except KeyError:
        problems.add(MANIFEST, f"does not hold the source's {CONFIG}")
    except NvfpPrepError as error:
        problems.add_error(CONFIG, error)


def _check_vectors(checkpoint: PreparedCheckpoint, layer: LayerRecord, problems: Problems) -> None:
    experts = layer.layer.dims.experts
    for vector in SCALE_VECTORS:
        record = checkpoint.record(layer.layer.prepared_name(vector))
        if (record.dtype, record.shape) != ("F32", (experts,)):
            problems.add(record.file, f"tensor {record.name!r} has the wrong dtype or shape", f"F32 [{experts}]")


def _check_index(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    raw = checkpoint.read_file(INDEX)
    weight_map = read_json_file(INDEX, raw).get("weight_map")
    served = {record.name: name for name in checkpoint.names(*_SERVED) for record in checkpoint.headers[name].tensors}
    if not isinstance(weight_map, dict):
        problems.add(INDEX, "has no weight_map")
        return
    for tensor in sorted(served.keys() | weight_map.keys()):
        if served.get(tensor) != weight_map.get(tensor):
            problems.add(INDEX, f"tensor {tensor!r}", served.get(tensor, "no entry"), weight_map.get(tensor, "none"))
