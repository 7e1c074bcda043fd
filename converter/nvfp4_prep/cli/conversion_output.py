"""What ``nvfp4-prep convert`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvfp4_prep._util.printable import join_lines
from nvfp4_prep.cli.output import hint, say, say_text, shell_line
from nvfp4_prep.cli.push import say_pushed

if TYPE_CHECKING:
    from nvfp4_prep.commands.convert import ConvertResult
    from nvfp4_prep.commands.convert_parts import PartResult
    from nvfp4_prep.publish.push import PushResult

__all__ = ["conversion_value", "say_conversion", "say_part", "warn_of_policy"]


def conversion_value(result: ConvertResult, pushed: PushResult | None) -> dict[str, Any]:
    """For ``--json``."""
    manifest = result.manifest
    return {
        "path": str(result.path),
        "already_complete": result.already_complete,
        "resumed": result.resumed,
        "written_nbytes": result.written_nbytes,
        "layers": len(manifest.layers),
        "tp_sizes": list(manifest.tp_sizes),
        "left_out": list(result.left_out),
        "warnings": list(result.warnings),
        "verified": [dict(check) for check in manifest.verified],
        "smoke": None if result.smoke is None else result.smoke.summary(),
        "pushed": None if pushed is None else pushed.to_dict(),
    }


def say_conversion(result: ConvertResult, pushed: PushResult | None, source: str, target: Path) -> None:
    """For people, on stdout."""
    from nvfp4_prep._util.text import count, format_nbytes
    from nvfp4_prep.cli.render import left_out_lines, quantization_lines, relative_error_text, tp_lines
    from nvfp4_prep.prepared.kernel_choice import kernel_lines

    manifest = result.manifest
    if pushed is not None:
        say_pushed(pushed)
    if result.already_complete:
        say(f"{target} is complete already" if pushed is not None else _complete_text(target, source))
        return
    lines = [
        f"{result.path}: {count(len(manifest.layers), 'MoE layer')} prepared,"
        f" {format_nbytes(result.written_nbytes)} written{' (continued)' if result.resumed else ''}",
        *kernel_lines(manifest.options.layout),
        *tp_lines((record.layout, record.dims) for record in manifest.layers),
        *(f"vLLM {line}" for line in quantization_lines(manifest.quantization.values())),
        *(f"left out {line}" for line in left_out_lines(result.left_out)),
        *(f"warning: {warning}" for warning in result.warnings),
    ]
    differing = sum(layer.gate_up.differing for layer in manifest.layers)
    if differing:
        policy = manifest.options.gate_up_scales.value
        exact = not manifest.options.gives_scales_up
        worst = max(
            (layer.gate_up.figures["relative_error"] for layer in manifest.layers if layer.gate_up.differing),
            key=lambda errors: float(errors[policy]),
        )
        lines.append(
            f"gate/up global scales differed in {count(differing, 'expert')}: both are stored, nothing was rescaled;"
            f" relative error of the weights: 0 (with one scale for both: reconcile {worst['reconcile']:.3g},"
            f" vllm {worst['vllm']:.3g})"
            if exact
            else f"gate/up global scales differed in {count(differing, 'expert')} ({policy}); worst layer's"
            f" {relative_error_text(worst)}"
        )
    lines += [f"verified: {check['check']}: {check['result']}" for check in manifest.verified]
    say_text(join_lines(lines))


def warn_of_policy(result: ConvertResult) -> None:
    """On stderr, if scales were given up."""
    manifest = result.manifest
    if manifest.options.gate_up_scales.value == "vllm" and any(layer.gate_up.differing for layer in manifest.layers):
        hint("warning: up's own scales are ignored as vLLM does; reconcile keeps them")


def say_part(part: PartResult, layers: str, source: str, target: Path) -> None:
    """One machine's part, for people."""
    from nvfp4_prep._util.text import count, format_nbytes

    if part.joined:
        say(_complete_text(target, source))
        return
    say(
        f"{part.path}: part of {count(len(part.layers), 'MoE layer')} ({layers}), {format_nbytes(part.written_nbytes)}"
        f" written{' (continued)' if part.resumed else ''}"
    )
    hint(f"next, when all parts are made: {shell_line('convert', source, target, '--join')}")


def _complete_text(target: Path, source: str) -> str:
    """What a target that was there already was found to be, and how to know more."""
    return (
        f"{target} is complete already: manifest, stamp, files, sizes, headers and index are right; the tensors' bytes"
        f" were not read. To read them: {shell_line('verify', target, '--source', source)}"
    )
