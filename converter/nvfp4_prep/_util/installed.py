"""Versions of this tool, Python and the packages that matter to it."""

from __future__ import annotations

import importlib.metadata
import platform

from nvfp4_prep._version import __version__

__all__ = ["installed_versions"]

_DISTRIBUTIONS = (
    "torch",
    "triton",
    "safetensors",
    "huggingface-hub",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
    "vllm",
    "sglang",
    "ray",
)


def installed_versions() -> dict[str, str]:
    """Return the versions of this tool, Python and the packages; empty where a package is not installed."""
    own = {"nvfp4-prep": __version__, "python": platform.python_version()}
    return own | {name: _version(name) for name in _DISTRIBUTIONS}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
