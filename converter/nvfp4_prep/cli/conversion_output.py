"""The output of ``nvfp4-prep convert``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import nvfp4_prep
from nvfp4_prep._util.printable import join_lines
from nvfp4_prep._util.text import count, format_nbytes, spans
from nvfp4_prep.cli.gate_up import gate_up_lines, gate_up_value, warn_of_policy
from nvfp4_prep.cli.output import command_line, hint, say, say_json, say_next, say_text, shell_line
from nvfp4_prep.cli.push import say_pushed
from nvfp4_prep.cli.render import (
    left_out_lines,
    outlook_text,
    outlook_value,
    plan_text,
    plan_value,
    quantization_lines,
    tp_lines,
)
from nvfp4_prep.cli.smoke import say_smoke
from nvfp4_prep.layouts import LAYOUTS
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.report.page import Subject, write_page

if TYPE_CHECKING:
    from nvfp4_prep.commands.convert import ConvertResult
    from nvfp4_prep.commands.convert_parts import PartResult
    from nvfp4_prep.commands.convert_request import ConvertRequest
    from nvfp4_prep.commands.preview import Preview
    from nvfp4_prep.commands.speed_estimate import SpeedEstimate
    from nvfp4_prep.output.layer_selection import LayerSelection
    from nvfp4_prep.prepared.manifest import Manifest
    from nvfp4_prep.publish.push import PushResult
    from nvfp4_prep.smoke.gate import SmokeFailedError
    from nvfp4_prep.smoke.report import SmokeReport

__all__ = ["say_checkpoint", "say_failed_smoke_run", "say_part", "say_preview"]

_LIMITS = {
    "cores": "the CPU, which hashes, rearranges and compares every byte",
    "digests": "the sha256 of the largest file, which one core computes",
    "disk read": "reading the source from disk",
    "names": "the planning of every tensor, which runs on one core",
}
"""What limits a conversion, by :attr:`~nvfp4_prep.commands.speed_estimate.SpeedEstimate.limit`, in words."""


def say_preview(preview: Preview, request: ConvertRequest, memory_nbytes: int, *, as_json: bool) -> None:
    """Print the outcome of ``--dry-run``, and on stderr why the run would be refused."""
    plan, room, outlook = preview.plan, preview.room, preview.outlook
    if as_json:
        value = plan_value(plan, room, memory_nbytes)
        say_json(value | {"target": outlook_value(outlook), "time": _time_value(preview.speed)})
    else:
        say_text(f"{plan_text(plan, room, memory_nbytes)}\n{outlook_text(outlook)}{_time_text(preview.speed)}")
    if outlook.refusal is not None:
        hint(f"error: {outlook.refusal}")
    elif request.selection is not None:
        _tell_other_layers(request.selection, request.selection.choose(layer.index for layer in plan.layers))


def _tell_other_layers(selection: LayerSelection, chosen: Iterable[int]) -> None:
    """Say on stderr which layers a selection means where it names others too, as ``1-99`` does of a model with 60."""
    if selection.ranges and selection.text != spans(chosen):
        hint(f"note: --layers {selection.text} also names what is not a MoE layer; the part has layers {spans(chosen)}")


def _time_value(speed: SpeedEstimate | None) -> dict[str, Any] | None:
    return None if speed is None else {**asdict(speed), "seconds": speed.seconds, "limit": speed.limit}


def _time_text(speed: SpeedEstimate | None) -> str:
    if speed is None:
        return ""
    read = "not measured" if speed.read_gb_per_s is None else f"{speed.read_gb_per_s:.2g} GB/s"
    return (
        f"\ntime     at least {max(1, round(speed.seconds)):,} s of work, limited by {_LIMITS[speed.limit]} (disk read"
        f" {read}, sha256 {speed.sha256_gb_per_s:.2g} GB/s a core, {count(speed.cores, 'core')}; writing was not"
        f" measured){_smoke_time_text(speed)}"
    )


def _smoke_time_text(speed: SpeedEstimate) -> str:
    if speed.smoke_s is None:
        return ", then a smoke test on the GPU"
    return f", then a smoke test of about {max(1, round(speed.smoke_s)):,} s on one core"


def say_part(part: PartResult, request: ConvertRequest, *, as_json: bool) -> None:
    """Print one machine's part."""
    if as_json:
        value = {
            "path": str(part.path),
            "layers": list(part.layers),
            "layer_count": len(part.layers),
            "files": part.files,
            "resumed": part.resumed,
        }
        say_json({**value, "joined": part.joined, "written_nbytes": part.written_nbytes})
        return
    if part.joined:
        say(_complete_text(request))
        return
    selection = request.selection
    if selection is not None:
        _tell_other_layers(selection, part.layers)
    say(
        f"{part.path}: part of {count(len(part.layers), 'MoE layer')} ({selection.text if selection else ''}),"
        f" {format_nbytes(part.written_nbytes)} written{' (continued)' if part.resumed else ''}"
    )
    join = shell_line("convert", request.source, request.target, *_option_words(request.options), "--join")
    hint(f"next, when all parts are made: {join}")


def _option_words(options: ConvertOptions) -> list[str]:
    """Return the options that are not the default, as words of a command: a join needs those of its parts."""
    given, default = options.to_dict(), ConvertOptions().to_dict()
    words = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value != default[name])
    return [word for pair in words for word in pair]


def say_checkpoint(result: ConvertResult, pushed: PushResult | None, request: ConvertRequest, *, as_json: bool) -> None:
    """Print the result of a conversion, write the page of ``--report``, and say on stderr what comes next."""
    if request.report is not None and result.smoke is not None:
        _write_report(request, result.manifest, result.smoke)
    if as_json:
        say_json(_value(result, pushed))
    else:
        _say_result(result, pushed, request)
        say_smoke(result.smoke)
    if request.report is not None and result.smoke is None:
        page = shell_line("verify", request.target, "--smoke", "--report", request.report)
        hint(f"no smoke test of what was complete already, and no {request.report}: {page} makes it")
    if not as_json and not result.already_complete:
        warn_of_policy(result.manifest)
        say_next("verify", request.target, "--source", request.source)


def say_failed_smoke_run(error: SmokeFailedError, request: ConvertRequest, *, as_json: bool) -> None:
    """Print a conversion that is whole but for the config, which the failed smoke test keeps back."""
    _write_report(request, error.manifest, error.report)
    if as_json:
        failed = nvfp4_prep.ConvertResult(request.target, error.manifest, False, False, 0, smoke=error.report)
        say_json(_value(failed, None))
    else:
        say_smoke(error.report)
    hint(f"error: {request.target} has no config.json, so that nothing serves this checkpoint; {error.next_step}")


def _write_report(request: ConvertRequest, manifest: Manifest, smoke: SmokeReport) -> None:
    if request.report is not None:
        subject = Subject(str(request.target), manifest, smoke=smoke)
        write_page(request.report, subject, request.target, request.source, command=command_line())


def _value(result: ConvertResult, pushed: PushResult | None) -> dict[str, Any]:
    """Return the value for ``--json``."""
    manifest = result.manifest
    return {
        "path": str(result.path),
        "already_complete": result.already_complete,
        "resumed": result.resumed,
        "written_nbytes": result.written_nbytes,
        "layers": len(manifest.layers),
        "layer_count": len(manifest.layers),
        "tp_sizes": list(manifest.tp_sizes),
        "gate_up": gate_up_value(manifest),
        "left_out": list(result.left_out),
        "left_out_reasons": dict(result.left_out_reasons),
        "warnings": list(result.warnings),
        "verified": [dict(check) for check in manifest.verified],
        "smoke": None if result.smoke is None else result.smoke.summary(),
        "pushed": None if pushed is None else pushed.to_dict(),
    }


def _say_result(result: ConvertResult, pushed: PushResult | None, request: ConvertRequest) -> None:
    manifest = result.manifest
    if pushed is not None:
        say_pushed(pushed)
    if result.already_complete:
        say(f"{request.target} is complete already" if pushed is not None else _complete_text(request))
        return
    lines = [
        f"{result.path}: {count(len(manifest.layers), 'MoE layer')} prepared,"
        f" {format_nbytes(result.written_nbytes)} written{' (continued)' if result.resumed else ''}",
        *LAYOUTS[manifest.options.layout].kernel_lines(),
        *tp_lines((record.layout, record.dims) for record in manifest.layers),
        *(f"vLLM {line}" for line in quantization_lines(manifest.quantization.values())),
        *(f"left out {line}" for line in left_out_lines(result.left_out_reasons)),
        *(f"warning: {warning}" for warning in result.warnings),
        *gate_up_lines(manifest),
        *(f"verified: {check['check']}: {check['result']}" for check in manifest.verified),
    ]
    say_text(join_lines(lines))


def _complete_text(request: ConvertRequest) -> str:
    """Return the finding about a target that was there already, and how to know more."""
    command = shell_line("verify", request.target, "--source", request.source)
    return (
        f"{request.target} is complete already: manifest, stamp, files, sizes, headers and index are right; the"
        f" tensors' bytes were not read. To read them: {command}"
    )
