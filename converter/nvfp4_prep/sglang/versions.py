"""Versions of SGLang with which this plugin was tried."""

from __future__ import annotations

import importlib.metadata
import re

__all__ = ["TESTED", "version_problem"]

TESTED = ("0.5.23",)
"""Releases for which `make test-sglang` passes; later 0.5 releases are taken if their own preparation agrees."""


def version_problem(version: str | None = None) -> str | None:
    """Return why this plugin does not work with a version of SGLang (the installed one by default), or ``None``."""
    found = version if version is not None else importlib.metadata.version("sglang")
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    if match is not None and (0, 5, 23) <= tuple(map(int, match.groups())) < (0, 6, 0):
        return None
    return (
        f"nvfp4-prep's plugin was tested with SGLang {', '.join(TESTED)} and takes later 0.5 releases; it refuses to"
        f" run in {found}, because wrong weights would go unnoticed. Install a tested SGLang, or a newer nvfp4-prep, or"
        " serve the source checkpoint (`nvfp4-prep restore` brings it back)."
    )
