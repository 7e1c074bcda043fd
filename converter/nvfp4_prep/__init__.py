"""Preparation of NVFP4 mixture-of-experts checkpoints for FlashInfer's fused-MoE kernels, CuteDSL and TRTLLM-gen.

The functions below are the public API; the command line is a thin shell around them. They are imported on first use,
because importing torch takes longer than printing a help text.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvfp4_prep._version import __version__

if TYPE_CHECKING:
    from nvfp4_prep._util.progress import choose_progress
    from nvfp4_prep.commands.bench_load import bench_load
    from nvfp4_prep.commands.bench_load_figures import LoadBench, LoadFigures
    from nvfp4_prep.commands.convert import ConvertResult, convert, plan
    from nvfp4_prep.commands.convert_parts import PartResult, convert_part, join_parts
    from nvfp4_prep.commands.convert_request import ConvertRequest
    from nvfp4_prep.commands.doctor import Diagnosis, diagnose
    from nvfp4_prep.commands.inspect import Inspection, inspect
    from nvfp4_prep.commands.preview import Preview, preview_conversion
    from nvfp4_prep.commands.relayout import RelayoutResult, relayout
    from nvfp4_prep.commands.restamp import RestampResult, restamp
    from nvfp4_prep.commands.restore import RestoreResult, restore
    from nvfp4_prep.commands.sample import KIMI_LAYER, SampleModel, write_sample
    from nvfp4_prep.commands.verify import verify
    from nvfp4_prep.commands.verify_published import verify_published
    from nvfp4_prep.commands.verify_report import VerifyReport
    from nvfp4_prep.hub.publish_options import PublishOptions
    from nvfp4_prep.layouts import LayoutName
    from nvfp4_prep.load.flashinfer import ReadyLayer, load_layer
    from nvfp4_prep.options import ConvertOptions, GateUpPolicy
    from nvfp4_prep.planning.plan import Plan
    from nvfp4_prep.publish.preview import PushPreview, preview_push
    from nvfp4_prep.publish.push import PushResult, push
    from nvfp4_prep.publish.stream import convert_and_publish
    from nvfp4_prep.smoke import SmokeReport, run_smoke
    from nvfp4_prep.smoke.gate import SmokeFailedError, SmokePolicy

__all__ = [
    "KIMI_LAYER",
    "ConvertOptions",
    "ConvertRequest",
    "ConvertResult",
    "Diagnosis",
    "GateUpPolicy",
    "Inspection",
    "LayoutName",
    "LoadBench",
    "LoadFigures",
    "PartResult",
    "Plan",
    "Preview",
    "PublishOptions",
    "PushPreview",
    "PushResult",
    "ReadyLayer",
    "RelayoutResult",
    "RestampResult",
    "RestoreResult",
    "SampleModel",
    "SmokeFailedError",
    "SmokePolicy",
    "SmokeReport",
    "VerifyReport",
    "__version__",
    "bench_load",
    "choose_progress",
    "convert",
    "convert_and_publish",
    "convert_part",
    "diagnose",
    "inspect",
    "join_parts",
    "load_layer",
    "plan",
    "preview_conversion",
    "preview_push",
    "push",
    "relayout",
    "restamp",
    "restore",
    "run_smoke",
    "verify",
    "verify_published",
    "write_sample",
]

_HOMES = {
    "ConvertOptions": "options",
    "ConvertRequest": "commands.convert_request",
    "ConvertResult": "commands.convert",
    "Diagnosis": "commands.doctor",
    "GateUpPolicy": "options",
    "Inspection": "commands.inspect",
    "LayoutName": "layouts",
    "LoadBench": "commands.bench_load_figures",
    "LoadFigures": "commands.bench_load_figures",
    "PartResult": "commands.convert_parts",
    "Plan": "planning.plan",
    "Preview": "commands.preview",
    "ReadyLayer": "load.flashinfer",
    "RelayoutResult": "commands.relayout",
    "RestampResult": "commands.restamp",
    "RestoreResult": "commands.restore",
    "KIMI_LAYER": "commands.sample",
    "SampleModel": "commands.sample",
    "SmokeFailedError": "smoke.gate",
    "SmokePolicy": "smoke.gate",
    "SmokeReport": "smoke",
    "VerifyReport": "commands.verify_report",
    "PublishOptions": "hub.publish_options",
    "PushPreview": "publish.preview",
    "PushResult": "publish.push",
    "bench_load": "commands.bench_load",
    "choose_progress": "_util.progress",
    "convert": "commands.convert",
    "convert_and_publish": "publish.stream",
    "diagnose": "commands.doctor",
    "preview_push": "publish.preview",
    "push": "publish.push",
    "convert_part": "commands.convert_parts",
    "inspect": "commands.inspect",
    "join_parts": "commands.convert_parts",
    "load_layer": "load.flashinfer",
    "plan": "commands.convert",
    "preview_conversion": "commands.preview",
    "relayout": "commands.relayout",
    "restamp": "commands.restamp",
    "restore": "commands.restore",
    "run_smoke": "smoke",
    "verify": "commands.verify",
    "verify_published": "commands.verify_published",
    "write_sample": "commands.sample",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
