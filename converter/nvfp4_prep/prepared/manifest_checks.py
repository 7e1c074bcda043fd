"""Cross-checks of a manifest's redundant fields: against each other, the kept configs and the scalars.

A manifest is not a signature: whoever can write it can write matching digests. What follows from headers, configs and
scalars is worked out again, bytes are compared by ``verify --source``. The figures of rescaled block scales (how many
were rounded, the relative errors) are a record of the conversion and are not worked out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvfp4_prep.checkpoint.filenames import MANIFEST, layer_file_stem
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.moe.activation import find_activation
from nvfp4_prep.moe.model_config import quantization_configs
from nvfp4_prep.prepared.checkpoint import PreparedCheckpoint, source_configs
from nvfp4_prep.prepared.config_edits import same_value
from nvfp4_prep.prepared.manifest import LayerRecord
from nvfp4_prep.prepared.problems import Problems

__all__ = ["changed_keys", "check_manifest"]


def check_manifest(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    """Note every value of the manifest that does not follow from what it should follow from."""
    manifest = checkpoint.manifest
    written = checkpoint.read_json(MANIFEST)
    for key in changed_keys(manifest.to_dict(), written):
        problems.add(MANIFEST, f"{key} does not follow from the rest of the manifest")
    config, hf_quant_config = source_configs(manifest)
    if not same_value(manifest.quantization, quantization_configs(config, hf_quant_config)):
        problems.add(MANIFEST, "the quantization configs are not those of the source's config files")
    for layer in manifest.layers:
        _check_activation(layer, config, problems)
        stem = layer_file_stem(layer.index)
        if any(not name.startswith(stem) for name in layer.files):
            problems.add(MANIFEST, f"number of {layer.experts_path}", f"files {stem}…", ", ".join(layer.files))
        try:
            _check_gate_up(checkpoint, layer, problems)
        except NvfpPrepError as error:
            problems.add_error(layer.experts_path, error)


def changed_keys(expected: object, actual: object) -> list[str]:
    """Return the paths of the keys of ``expected`` that have another value in ``actual``, or none.

    Keys that ``actual`` has beside them are a later version's, which readers ignore.
    """
    changed: list[str] = []
    pending: list[tuple[str, object, object]] = [("", expected, actual)]
    while pending:
        path, mine, theirs = pending.pop()
        here = f"{path}." if path else ""
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            changed += [f"{here}{key}" for key in mine if key not in theirs]
            pending += [(f"{here}{key}", mine[key], theirs[key]) for key in mine if key in theirs]
        elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
            pending += [(f"{here}{at}", *pair) for at, pair in enumerate(zip(mine, theirs, strict=True))]
        elif not same_value(mine, theirs):
            changed.append(path)
    return sorted(changed)


def _check_activation(layer: LayerRecord, config: Mapping[str, Any], problems: Problems) -> None:
    want = find_activation(config, gated=layer.gated, layer=layer.index)
    if layer.activation != want:
        problems.add(MANIFEST, f"activation of {layer.experts_path}", str(want), str(layer.activation))


def _check_gate_up(checkpoint: PreparedCheckpoint, layer: LayerRecord, problems: Problems) -> None:
    scalars, where = checkpoint.scalars(layer), layer.experts_path
    differing, options = scalars.differing, checkpoint.manifest.options
    have = (layer.gate_up.differing, layer.gate_up.worst_ratio)
    want = (len(differing), scalars.worst_ratio)
    if have != want:
        problems.add(MANIFEST, f"gate and up scales of {where} (how many differ, worst ratio)", str(want), str(have))
    reconciled = tuple(expert for expert, _ in layer.gate_up.reconciled)
    if reconciled != options.reconciled(differing):
        asked = f"layout {options.layout.value} and policy {options.gate_up_scales.value}"
        problems.add(MANIFEST, f"reconciled experts of {where} are not those that {asked} ask for")
