"""What a prepared checkpoint made of experts whose gate and up have different global scales, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvfp4_prep._util.text import count
from nvfp4_prep.cli.output import hint
from nvfp4_prep.cli.render import relative_error_text
from nvfp4_prep.options import GateUpPolicy

if TYPE_CHECKING:
    from nvfp4_prep.prepared.manifest import Manifest

__all__ = ["gate_up_lines", "gate_up_value", "warn_of_policy"]


def gate_up_value(manifest: Manifest) -> dict[str, Any]:
    """Return the value for ``--json``: numbers of experts and of block scales."""
    records = [layer.gate_up for layer in manifest.layers]
    return {
        "policy": manifest.options.gate_up_scales.value,
        "differing": sum(record.differing for record in records),
        "rescaled": sum(len(record.reconciled) for record in records),
        "rounded_block_scales": sum(record.figures.get("rounded", 0) for record in records),
    }


def gate_up_lines(manifest: Manifest) -> list[str]:
    """Return one line where gate and up had different global scales, with the price of the policy."""
    differing = sum(layer.gate_up.differing for layer in manifest.layers)
    if not differing:
        return []
    policy = manifest.options.gate_up_scales.value
    errors = [layer.gate_up.figures["relative_error"] for layer in manifest.layers if layer.gate_up.differing]
    worst = max(errors, key=lambda figures: float(figures[policy]))
    if not manifest.options.gives_scales_up:
        return [
            f"gate/up global scales differed in {count(differing, 'expert')}: both are stored, nothing was rescaled;"
            f" relative error of the weights: 0 (with one scale for both: reconcile {worst['reconcile']:.3g},"
            f" vllm {worst['vllm']:.3g})"
        ]
    return [
        f"gate/up global scales differed in {count(differing, 'expert')} ({policy}); worst layer's"
        f" {relative_error_text(worst)}"
    ]


def warn_of_policy(manifest: Manifest) -> None:
    """Warn on stderr if scales were given up."""
    if manifest.options.gate_up_scales == GateUpPolicy.VLLM and any(
        layer.gate_up.differing for layer in manifest.layers
    ):
        hint("warning: up's own scales are ignored as vLLM does; reconcile keeps them")
