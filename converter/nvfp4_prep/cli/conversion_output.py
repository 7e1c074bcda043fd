"""What ``nvfp4-prep convert`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nvfp4_prep.cli.push import say_pushed

if TYPE_CHECKING:
    from nvfp4_prep.conversion import ConvertResult
    from nvfp4_prep.hub.push import PushResult

__all__ = ["conversion_value", "say_conversion", "say_next"]


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
        "verified": [dict(check) for check in manifest.verified],
        "pushed": None if pushed is None else pushed.to_dict(),
    }


def say_conversion(result: ConvertResult, pushed: PushResult | None, target: Path) -> None:
    """For people, on stdout."""
    from nvfp4_prep.reporting import relative_error_text, tp_lines
    from nvfp4_prep.units import format_nbytes

    manifest = result.manifest
    if pushed is not None:
        say_pushed(pushed)
    if result.already_complete:
        click.echo(
            f"{result.path} is complete already: nothing to do. If nvfp4-prep verify {target} finds damage,"
            " remove it and convert again"
        )
        return
    lines = [
        f"{result.path}: {len(manifest.layers)} MoE layers prepared, {format_nbytes(result.written_nbytes)} written"
        f"{' (continued)' if result.resumed else ''}",
        *tp_lines((record.layout, record.layer.dims) for record in manifest.layers),
    ]
    differing = sum(layer.gate_up.differing for layer in manifest.layers)
    if differing:
        policy = manifest.options.gate_up_scales.value
        worst = max(
            (layer.gate_up.figures["relative_error"] for layer in manifest.layers if layer.gate_up.differing),
            key=lambda errors: float(errors[policy]),
        )
        lines.append(
            f"gate/up global scales differed in {differing} experts ({policy}); worst layer's"
            f" {relative_error_text(worst)}"
        )
    lines += [f"verified: {check['check']}: {check['result']}" for check in manifest.verified]
    click.echo("\n".join(lines))


def say_next(result: ConvertResult, source: str, target: Path) -> None:
    """Warnings and the next command, on stderr."""
    manifest = result.manifest
    ignored = manifest.options.gate_up_scales.value == "vllm" and any(
        layer.gate_up.differing for layer in manifest.layers
    )
    if ignored:
        click.echo("warning: up's own scales are ignored as vLLM does; reconcile keeps them", err=True)
    click.echo(f"next: nvfp4-prep verify {target} --source {source}", err=True)
