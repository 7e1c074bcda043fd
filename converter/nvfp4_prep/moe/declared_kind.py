"""The experts' kind that the quantization config declares, against the kind of their tensors: NVFP4, W4A4.

Tensors alone do not tell all: a server chooses its method by the config, and prepared experts are not in the form that
another method reads. What vLLM 0.33 makes of each config was read in its modelopt.py, compressed_tensors.py and
model_arch_config_convertor.py. Regular expressions of a config are compared as text and never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from nvfp4_prep._util.text import count, first_of
from nvfp4_prep.checkpoint.filenames import quoted
from nvfp4_prep.formats import Leaf
from nvfp4_prep.moe.layers import MoeLayer
from nvfp4_prep.moe.validation import NotPrepared, quark, refuse

__all__ = ["declared_refusal", "declared_warnings"]

_INSTEAD = (
    "Serve the source as it is; or, if the tensors are right and the config is not, correct the config of a copy."
)
_ATTENTION = ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "embed")
"""Targets of transforms with one of these words are not experts."""
_ONLINE = ("input", "output")
"""Locations of transforms that a server computes; those of weights are in the weights already."""
_OTHER_METHODS = frozenset(
    [
        "auto_awq",
        "auto_gptq",
        "awq",
        "bitsandbytes",
        "fbgemm_fp8",
        "fp8",
        "gguf",
        "gptq",
        "mxfp4",
        "mxfp8",
        "quanto",
        "torchao",
    ]
)
"""Methods that hold no NVFP4. A name that is not known may be of a format that a plugin adds."""
_STORED = ("modelopt", "compressed-tensors")
"""Methods whose names are those of the formats."""
_MOST_PATTERNS, _LONGEST_PATTERN = 20_000, 500


def declared_refusal(configs: Mapping[str, Any]) -> NotPrepared | None:
    """Return why experts in NVFP4 must not be prepared beside these configs, of which the first one counts."""
    for where, config in configs.items():
        return _refusal(where, config)
    return None


def declared_warnings(configs: Mapping[str, Any], layers: Sequence[MoeLayer]) -> Iterator[str]:
    """Yield what the configs say against the tensors, and does not keep the output from being served like the source.

    Args:
        configs: by where they stand; the first one counts.
        layers: NVFP4 layers.
    """
    if not layers:
        return
    for position, (where, config) in enumerate(configs.items()):
        refusal = _refusal(where, config)
        if position and refusal is not None:
            yield f"{refusal.reason}; {next(iter(configs))} is the one that counts"
        elif not position:
            yield from _format_warnings(where, config, layers)
            yield from _excluded_warnings(where, config, layers)
            yield from _transform_warnings(where, config)


def _refusal(where: str, config: Mapping[str, Any]) -> NotPrepared | None:
    method = _method(config)
    if method == "quark":
        return quark(f"quant_method is quark in {where}")
    if method == "compressed-tensors":
        return _compressed_tensors_refusal(where, config)
    if method in _OTHER_METHODS:
        return _other(where, f"quant_method {method}")
    algorithm = _inner(config).get("quant_algo")
    if not isinstance(algorithm, str) or not algorithm or (method and not method.startswith("modelopt")):
        return None
    return _modelopt_refusal(where, config, algorithm.upper())


def _modelopt_refusal(where: str, config: Mapping[str, Any], algorithm: str) -> NotPrepared | None:
    if algorithm == "NVFP4":
        groups = _groups(config)
        weight_only = bool(groups) and all(group.get("input_activations") is None for group in groups)
        return _weight_only(where) if weight_only else None
    if algorithm == "MIXED_PRECISION":
        layers = _mapping(_inner(config).get("quantized_layers"))
        kinds = {str(_mapping(layer).get("quant_algo")).upper() for layer in layers.values()}
        if not layers or "NVFP4" in kinds:
            return None
        algorithm = f"MIXED_PRECISION of {_some(sorted(kinds))}"
    return _other(where, f"quant_algo {algorithm}")


def _compressed_tensors_refusal(where: str, config: Mapping[str, Any]) -> NotPrepared | None:
    groups = _groups(config)
    if not groups:
        return None
    nvfp4 = [group for group in groups if _is_nvfp4(group.get("weights"))]
    if not nvfp4:
        return _other(where, "no config group of 4-bit float weights with a scale for 16")
    inputs = [group.get("input_activations") for group in nvfp4]
    if all(activations is None for activations in inputs):
        return _weight_only(where)
    if not any(_is_nvfp4(activations) for activations in inputs):
        return _other(where, "activations of another kind than the weights' NVFP4")
    return _transform_refusal(where, config)


def _transform_refusal(where: str, config: Mapping[str, Any]) -> NotPrepared | None:
    """Refuse transforms that the model's author wants computed before or after the experts' projections."""
    for name, group in _mapping(_mapping(config.get("transform_config")).get("config_groups")).items():
        for args in _list(_mapping(group).get("apply")):
            if _mapping(args).get("location") not in _ONLINE:
                continue
            targets = [str(target) for target in _list(_mapping(args).get("targets"))]
            if all(any(word in target for word in _ATTENTION) for target in targets):
                continue
            return refuse(
                "transforms",
                f"{where} has a transform ({quoted(name)}) for the {_mapping(args)['location']} of"
                f" {_some(targets)}, which may be experts; neither vLLM nor the kernel applies it to them",
                "Serve the source with a server that does, or quantize again without transforms of the experts.",
            )
    return None


def _weight_only(where: str) -> NotPrepared:
    return refuse(
        "declared W4A16",
        f"{where} says that experts are weight-only NVFP4 (W4A16: input_activations is null), and their tensors have"
        " input scales; a server computes W4A16 then, and the kernel W4A4",
        _INSTEAD,
    )


def _other(where: str, said: str) -> NotPrepared:
    return refuse(
        "declared kind",
        f"{where} says {said[:300]}, and the experts' tensors are NVFP4 (W4A4); a server goes by the config",
        _INSTEAD,
    )


def _format_warnings(where: str, config: Mapping[str, Any], layers: Sequence[MoeLayer]) -> Iterator[str]:
    method = _method(config)
    expected = "modelopt" if method.startswith("modelopt") else method
    others = [layer for layer in layers if layer.format in _STORED and layer.format != expected]
    if expected in _STORED and others:
        yield (
            f"{where} has quant_method {method}, and the experts of {count(len(others), 'layer')}"
            f" ({others[0].experts_path}) are stored as {others[0].format} stores NVFP4: servers go by the config and"
            " do not find them in the source"
        )


def _transform_warnings(where: str, config: Mapping[str, Any]) -> Iterator[str]:
    transforms = _mapping(config.get("transform_config"))
    if transforms:
        yield (
            f"{where} has transforms ({_some(_mapping(transforms.get('config_groups')) or transforms)}): vLLM applies"
            " them to linear layers and never to routed experts, of the source as of the output"
        )


def _excluded_warnings(where: str, config: Mapping[str, Any], layers: Sequence[MoeLayer]) -> Iterator[str]:
    """Yield warnings about excluded layers: wrong lists of exporters decide nothing here, but a server goes by them."""
    inner = _inner(config)
    patterns = [
        pattern
        for pattern in [*_list(inner.get("ignore")), *_list(inner.get("exclude_modules"))][:_MOST_PATTERNS]
        if isinstance(pattern, str) and len(pattern) <= _LONGEST_PATTERN
    ]
    excluded = [layer.experts_path for layer in layers if _matches(layer, patterns)]
    if excluded:
        yield (
            f"{where} excludes {count(len(excluded), 'layer')} from quantization ({excluded[0][:200]}) whose experts"
            " are NVFP4: vLLM would not read them as such; correct the list in a copy of the source"
        )


def _matches(layer: MoeLayer, patterns: Iterable[str]) -> bool:
    codes = next(group for group in layer.groups if group.leaf is Leaf.CODES)
    names = (layer.experts_path, codes.records[0].name.rpartition(".")[0])
    return any(name == it or ("*" in it and fnmatchcase(name, it)) for it in patterns for name in names)


def _method(config: Mapping[str, Any]) -> str:
    """Return the method's name as vLLM normalizes it."""
    said = config.get("quant_method")
    return said.lower().replace("compressed_tensors", "compressed-tensors") if isinstance(said, str) else ""


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part that has the algorithm: nested in hf_quant_config.json and older configs."""
    return config["quantization"] if isinstance(config.get("quantization"), Mapping) else config


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the config groups but attention's; none, if one of them is of another form than is known."""
    groups = list(_mapping(config.get("config_groups")).values())
    if not all(isinstance(group, Mapping) for group in groups):
        return []
    return [group for group in groups if not _is_attention(_list(group.get("targets")))]


def _is_attention(targets: list[Any]) -> bool:
    """Return whether a group is left out by vLLM, which quantizes attention by its KV cache."""
    return len(targets) == 1 and str(targets[0]).endswith("Attention")


def _is_nvfp4(arguments: object) -> bool:
    said = _mapping(arguments)
    return said.get("num_bits") == 4 and said.get("type") == "float" and said.get("group_size", 16) == 16


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _some(names: Iterable[str]) -> str:
    return first_of(quoted(name, 80) for name in names)
