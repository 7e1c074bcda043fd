"""Positions of the error bars of each layer, for the report's SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nvfp4_prep.smoke.report import LayerReport

__all__ = ["Bar", "Chart", "GridLine", "error_chart"]

_WIDEST, _NARROWEST, _HEIGHT = 1000, 360, 264
_LAYER_WIDTH = 30
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 38
_LOWEST, _HIGHEST = -9, 1
"""Powers of ten on the axis; 0 and everything below is drawn at the bottom, NaN and infinity at the top."""
_MAX_LABELS = 30


@dataclass(frozen=True)
class GridLine:
    """A power of ten, at height ``y``."""

    y: float
    label: str


@dataclass(frozen=True)
class Bar:
    """One layer: smallest, median and largest relative error of its experts, with noise floor and limit.

    Attributes:
        x, x1, x2: centre, and ends of the ticks.
        low, middle, high, floor, limit: heights of the figures.
        label: the layer's number, empty where there is no room for it.
        words: the figures as text.
        passed: whether nothing is wrong.
    """

    x: float
    x1: float
    x2: float
    low: float
    middle: float
    high: float
    floor: float
    limit: float
    label: str
    words: str
    passed: bool


@dataclass(frozen=True)
class Chart:
    """Chart for the template, in the units of the SVG's view box."""

    grid: tuple[GridLine, ...]
    bars: tuple[Bar, ...]
    width: int
    height: int = _HEIGHT
    left: int = _LEFT

    @property
    def right(self) -> int:
        """x of the grid's right edge, in units of the drawing."""
        return self.width - _RIGHT

    @property
    def least_px(self) -> int:
        """Width on a narrow screen, below which the labels could not be read: it scrolls there."""
        return round(0.9 * self.width)

    @property
    def most_px(self) -> int:
        """Width on a wide screen, above which a chart of few layers would be all frame."""
        return round(1.3 * self.width)


def error_chart(layers: Sequence[LayerReport]) -> Chart:
    """Return the chart of the relative errors over the experts of each layer; the axis is logarithmic."""
    width = max(_NARROWEST, min(_WIDEST, _LEFT + _RIGHT + _LAYER_WIDTH * len(layers)))
    step = (width - _LEFT - _RIGHT) / max(1, len(layers))
    every = max(1, math.ceil(len(layers) / _MAX_LABELS))
    grid = tuple(GridLine(_height(10.0**power), f"1e{power}") for power in range(_LOWEST, _HIGHEST + 1, 2))
    bars = tuple(
        _bar(layer, _LEFT + step * (position + 0.5), min(10.0, step * 0.35), labelled=position % every == 0)
        for position, layer in enumerate(layers)
    )
    return Chart(grid, bars, width)


def _bar(layer: LayerReport, x: float, half: float, *, labelled: bool) -> Bar:
    errors = sorted((figure.errors.relative for figure in layer.figures), key=_rank)
    return Bar(
        x=round(x, 1),
        x1=round(x - half, 1),
        x2=round(x + half, 1),
        low=_height(errors[0]),
        middle=_height((errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2),
        high=_height(errors[-1]),
        floor=_height(layer.noise.relative),
        limit=_height(max((figure.errors.relative_limit for figure in layer.figures), key=_rank)),
        label=str(layer.index) if labelled else "",
        words=f"layer {layer.index}: {errors[0]:.2e} to {errors[-1]:.2e}, noise floor {layer.noise.relative:.2e}",
        passed=layer.passed,
    )


def _rank(value: float) -> float:
    """Sort key by which NaN comes last, as the worst value."""
    return math.inf if math.isnan(value) else value


def _height(value: float) -> float:
    power = _HIGHEST if not math.isfinite(value) else _LOWEST if value <= 0 else math.log10(value)
    share = (min(max(power, _LOWEST), _HIGHEST) - _LOWEST) / (_HIGHEST - _LOWEST)
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)
