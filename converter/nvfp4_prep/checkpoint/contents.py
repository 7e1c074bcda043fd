"""Recognition of directories that are not Hugging Face checkpoints in safetensors files, by the files' names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from nvfp4_prep._util.text import first_of
from nvfp4_prep.checkpoint.filenames import CONFIG, SAFETENSORS, quoted

__all__ = ["ADAPTER_CONFIG", "WEIGHT_SUFFIXES", "Contents", "recognise"]

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model"
_PUBLISHED = "Only safetensors can be prepared: give a checkpoint that was published as such."
_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".engine": "TensorRT .engine",
    ".plan": "TensorRT .plan",
    ".nemo": "NeMo",
    ".onnx": "ONNX",
    ".bin": "PyTorch .bin",
    ".pth": "PyTorch .pth",
    ".pt": "PyTorch .pt",
    ".ckpt": ".ckpt",
    ".h5": "Keras .h5",
    ".msgpack": "Flax .msgpack",
    ".npz": "NumPy .npz",
    ".pdparams": "Paddle .pdparams",
    ".tflite": "TensorFlow Lite",
}
"""Suffix to format, the most telling first: a GGUF repository may hold a .bin file too."""
WEIGHT_SUFFIXES = (SAFETENSORS, ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
"""Suffixes of files that a conversion leaves out, because they hold the model's weights once more. Repositories of the
Hub offer a model in these formats beside safetensors. The others of ``_FORMATS`` name a directory without safetensors;
beside them they may hold anything else (statistics in ``.npz``), so they are copied.
"""
_NEXT_STEPS = {
    ".gguf": "A GGUF repository cannot be prepared: give the NVFP4 checkpoint in safetensors files.",
    ".engine": "An engine is built for one GPU and cannot be prepared: give the checkpoint that it was built from.",
    ".plan": "An engine is built for one GPU and cannot be prepared: give the checkpoint that it was built from.",
}
_NO_WEIGHTS = ("training_args.", "optimizer", "scheduler", "rng_state", "scaler.")
"""What a trainer leaves beside the weights, in files of the same formats."""


@dataclass(frozen=True)
class Contents:
    """Other contents of a directory: the end of a sentence that begins with what is missing, and the next step."""

    what: str
    next_step: str


def recognise(names: Iterable[str], default_next_step: str) -> Contents:
    """Return what a directory without ``config.json`` or without safetensors files holds.

    Args:
        names: of its files, relative to it.
        default_next_step: where nothing is recognised.
    """
    known = sorted(names)
    found = _adapter(known) or _other_model(known) or _spelling(known) or _checkpoint_below(known) or _format(known)
    return found or Contents("", default_next_step)


def _adapter(names: Collection[str]) -> Contents | None:
    if ADAPTER_CONFIG not in names and not any(name.startswith(_ADAPTER_WEIGHTS) for name in names):
        return None
    others = [
        name for name in names if _is_top(name) and _has_suffix(name, SAFETENSORS) and _ADAPTER_WEIGHTS not in name
    ]
    if others:
        return None
    return Contents(
        ": it holds a LoRA adapter, not a model",
        "Give the NVFP4 checkpoint of the base model, and the adapter to the server.",
    )


def _other_model(names: Collection[str]) -> Contents | None:
    """Return a model in a layout of files that has another config in the place of ``config.json``."""
    if CONFIG in names:
        return None
    if "model_index.json" in names:
        return Contents(
            ": it is a diffusers pipeline (model_index.json)",
            "Only language models with routed experts can be prepared.",
        )
    if "params.json" in names and any(name.startswith("consolidated") for name in names):
        return Contents(
            ": it holds a model as Mistral or Meta distributes it (params.json, consolidated…)",
            "Give the checkpoint in Hugging Face's form, with config.json.",
        )
    return None


def _spelling(names: Collection[str]) -> Contents | None:
    """Return names that differ from the right ones by their case, which servers do not read."""
    if CONFIG not in names:
        config = next((name for name in names if name.casefold() == CONFIG), None)
        if config is not None:
            return Contents(f", but {quoted(config)}", f"Rename it: servers read {CONFIG} only.")
    odd = [name for name in names if _is_top(name) and _has_suffix(name, SAFETENSORS)]
    if odd and not any(name.endswith(SAFETENSORS) for name in odd):
        return Contents(f", but {first_of(odd)}", "Rename them: servers read *.safetensors only, in lower case.")
    return None


def _checkpoint_below(names: Collection[str]) -> Contents | None:
    """Return the folders that hold what is missing, if the directory itself has no weights in safetensors files."""
    if any(_is_top(name) and name.endswith(SAFETENSORS) for name in names):
        return None
    there = set(names)
    with_weights = {str(PurePosixPath(name).parent) for name in names if name.endswith(SAFETENSORS)}
    folders = sorted(folder for folder in with_weights if f"{folder}/{CONFIG}" in there)
    if not folders:
        return None
    held = f"{len(folders)} checkpoints are in the folders" if folders[1:] else "a checkpoint is in the folder"
    return Contents(f": {held} {first_of(folders)}", f"Give the folder: …/{folders[0][:200]}.")


def _format(names: Collection[str]) -> Contents | None:
    if any(name.endswith(SAFETENSORS) for name in names):
        return None
    weights = [name for name in names if not PurePosixPath(name).name.startswith(_NO_WEIGHTS)]
    for suffix, form in _FORMATS.items():
        found = [name for name in weights if _has_suffix(name, suffix)]
        if found:
            return Contents(
                f": its weights are {form} files ({first_of(found, 1)}), not safetensors",
                _NEXT_STEPS.get(suffix, _PUBLISHED),
            )
    return None


def _is_top(name: str) -> bool:
    return "/" not in name


def _has_suffix(name: str, suffix: str) -> bool:
    return name[-len(suffix) :].casefold() == suffix
