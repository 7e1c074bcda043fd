"""Error bars of each layer as an inline SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from nvfp4_prep.smoke.report import LayerReport

__all__ = ["error_chart"]

_WIDTH, _HEIGHT = 1000, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 38
_LOWEST, _HIGHEST = -9, 1
"""Powers of ten on the axis; 0 and everything below is drawn at the bottom, NaN and infinity at the top."""
_MAX_LABELS = 30


def error_chart(layers: Sequence[LayerReport]) -> str:
    """Smallest, median and largest relative error over the experts of each layer, with noise floor and limit."""
    parts = [_grid()]
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(layers))
    every = max(1, math.ceil(len(layers) / _MAX_LABELS))
    for position, layer in enumerate(layers):
        x = _LEFT + step * (position + 0.5)
        parts.append(_layer(layer, x, min(10.0, step * 0.35)))
        if position % every == 0:
            parts.append(f"<text x='{x:.1f}' y='{_HEIGHT - 20}' text-anchor='middle'>{layer.index}</text>")
    parts.append(f"<text x='{(_LEFT + _WIDTH) / 2:.0f}' y='{_HEIGHT - 4}' text-anchor='middle'>layer</text>")
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='relative error by layer'>{''.join(parts)}</svg>"
    )


def _layer(layer: LayerReport, x: float, half: float) -> str:
    errors = sorted(figure.errors.relative for figure in layer.figures)
    low, middle, high = _height(errors[0]), _height(statistics.median(errors)), _height(errors[-1])
    floor = _height(layer.noise.relative)
    limit = _height(max(figure.errors.relative_limit for figure in layer.figures))
    words = f"layer {layer.index}: {errors[0]:.2e} to {errors[-1]:.2e}, noise floor {layer.noise.relative:.2e}"
    kind = "" if layer.passed else " class='wrong'"
    return (
        f"<g{kind}><title>{words}</title>"
        f"<line class='limit' x1='{x - half:.1f}' x2='{x + half:.1f}' y1='{limit:.1f}' y2='{limit:.1f}'/>"
        f"<line class='floor' x1='{x - half:.1f}' x2='{x + half:.1f}' y1='{floor:.1f}' y2='{floor:.1f}'/>"
        f"<line class='bar' x1='{x:.1f}' x2='{x:.1f}' y1='{low:.1f}' y2='{high:.1f}'/>"
        f"<circle class='dot' cx='{x:.1f}' cy='{middle:.1f}' r='4'/></g>"
    )


def _height(value: float) -> float:
    power = _HIGHEST if not math.isfinite(value) else _LOWEST if value <= 0 else math.log10(value)
    share = (min(max(power, _LOWEST), _HIGHEST) - _LOWEST) / (_HIGHEST - _LOWEST)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _grid() -> str:
    lines = []
    for power in range(_LOWEST, _HIGHEST + 1, 2):
        y = _height(10.0**power)
        lines.append(f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        lines.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>1e{power}</text>")
    return "".join(lines)
