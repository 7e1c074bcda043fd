"""The fused-MoE smoke run: prepared weights through a kernel, the source through a reference, compared."""

from nvfp4_prep.smoke.layer import SmokeSettings
from nvfp4_prep.smoke.report import LayerReport, SmokeReport
from nvfp4_prep.smoke.run import run_smoke

__all__ = ["LayerReport", "SmokeReport", "SmokeSettings", "run_smoke"]
