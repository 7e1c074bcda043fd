"""The fused-MoE smoke run: prepared weights through a kernel, the source through a reference, compared.

The names below are imported on first use: reports and pages do not need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvfp4_prep.smoke.layer import SmokeSettings
    from nvfp4_prep.smoke.report import LayerReport, SmokeReport
    from nvfp4_prep.smoke.run import run_smoke

__all__ = ["LayerReport", "SmokeReport", "SmokeSettings", "run_smoke"]

_HOMES = {"LayerReport": "report", "SmokeReport": "report", "SmokeSettings": "layer", "run_smoke": "run"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
