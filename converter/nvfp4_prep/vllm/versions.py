"""Which versions of vLLM this plugin was tried with."""

from __future__ import annotations

import importlib.metadata
import re

__all__ = ["TESTED", "version_problem"]

TESTED = ("0.33",)
"""Minor versions for which `make test-vllm` passes. The plugin stands on vLLM's internals, so others are refused."""


def version_problem(version: str | None = None) -> str | None:
    """Why this plugin does not work with a version of vLLM (the installed one by default), or ``None``."""
    found = version if version is not None else importlib.metadata.version("vllm")
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is not None and f"{match[1]}.{match[2]}" in TESTED:
        return None
    return (
        f"nvfp4-prep's plugin was tested with vLLM {', '.join(f'{minor}.x' for minor in TESTED)} and refuses to run in"
        f" {found}, because wrong weights would go unnoticed. Install a tested vLLM, or a newer nvfp4-prep, or serve"
        " the source checkpoint (`nvfp4-prep restore` brings it back)."
    )
