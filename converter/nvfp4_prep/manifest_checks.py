"""What a manifest says twice must agree: values that follow from others, from the kept configs and from the scalars.

A manifest is no signature: whoever can write it can write matching digests. What follows from headers, configs and
scalars is worked out again, bytes are compared by ``verify --source``. The figures of rescaled block scales (how many
were rounded, the relative errors) are a record of the conversion and are not worked out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvfp4_prep.activation import find_activation
from nvfp4_prep.errors import NvfpPrepError
from nvfp4_prep.index import CONFIG, HF_QUANT_CONFIG, read_json_file
from nvfp4_prep.manifest import MANIFEST, LayerRecord
from nvfp4_prep.options import GateUpPolicy
from nvfp4_prep.plan_data import layer_file_stem
from nvfp4_prep.prepared import PreparedCheckpoint
from nvfp4_prep.problems import Problems
from nvfp4_prep.stamp import quantization_configs

__all__ = ["changed_keys", "check_manifest"]


def check_manifest(checkpoint: PreparedCheckpoint, problems: Problems) -> None:
    """Notes every value of the manifest that does not follow from what it should follow from."""
    manifest = checkpoint.manifest
    written = read_json_file(MANIFEST, checkpoint.read_file(MANIFEST))
    for key in changed_keys(manifest.to_dict(), written):
        problems.add(MANIFEST, f"{key} does not follow from the rest of the manifest")
    config = read_json_file(CONFIG, manifest.texts[CONFIG])
    quant = manifest.texts.get(HF_QUANT_CONFIG)
    hf_quant_config = None if quant is None else read_json_file(HF_QUANT_CONFIG, quant)
    if dict(manifest.quantization) != quantization_configs(config, hf_quant_config):
        problems.add(MANIFEST, "the quantization configs are not those of the source's config files")
    for layer in manifest.layers:
        _check_activation(layer, config, problems)
        stem = layer_file_stem(layer.layer.index)
        if any(not name.startswith(stem) for name in layer.files):
            problems.add(MANIFEST, f"number of {layer.layer.experts_path}", f"files {stem}…", ", ".join(layer.files))
        try:
            _check_gate_up(checkpoint, layer, problems)
        except NvfpPrepError as error:
            problems.add_error(layer.layer.experts_path, error)


def changed_keys(expected: object, actual: object, path: str = "") -> list[str]:
    """Paths of the values in which two JSON values differ, as ``layers.0.experts``."""
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        names: Sequence[Any] = sorted({*expected, *actual})
        pairs = [(name, expected.get(name), actual.get(name)) for name in names]
        missing = [name for name in names if (name in expected) != (name in actual)]
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs, missing = [(str(at), *pair) for at, pair in enumerate(zip(expected, actual, strict=True))], []
    else:
        return [] if expected == actual else [path]
    here = f"{path}." if path else ""
    return [
        key
        for name, mine, theirs in pairs
        for key in ([f"{here}{name}"] if name in missing else changed_keys(mine, theirs, f"{here}{name}"))
    ]


def _check_activation(layer: LayerRecord, config: Mapping[str, Any], problems: Problems) -> None:
    want = find_activation(config, gated=layer.layer.gated, layer=layer.layer.index)
    if layer.activation != want:
        problems.add(MANIFEST, f"activation of {layer.layer.experts_path}", str(want), str(layer.activation))


def _check_gate_up(checkpoint: PreparedCheckpoint, layer: LayerRecord, problems: Problems) -> None:
    scalars, where = checkpoint.scalars(layer), layer.layer.experts_path
    differing, policy = scalars.differing, checkpoint.manifest.options.gate_up_scales
    have = (layer.gate_up.differing, layer.gate_up.worst_ratio)
    want = (len(differing), scalars.worst_ratio)
    if have != want:
        problems.add(MANIFEST, f"gate and up scales of {where} (how many differ, worst ratio)", str(want), str(have))
    reconciled = tuple(expert for expert, _ in layer.gate_up.reconciled)
    if reconciled != (differing if policy is GateUpPolicy.RECONCILE else ()):
        problems.add(MANIFEST, f"reconciled experts of {where} are not those that the policy {policy.value} asks for")
