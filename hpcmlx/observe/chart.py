"""Line charts for `report.html`: from numbers to the points and ticks that the template draws.

Plain SVG, so that a page needs neither matplotlib nor a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcmlx.figures import BLUE, GREEN, VERMILION

WIDTH, HEIGHT = 720.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 12.0, 28.0
_POINTS = 500  # of a line; more cannot be told apart
COLORS = (BLUE, VERMILION, GREEN)


@dataclass(frozen=True)
class Line:
    """A line of a chart, in the picture's coordinates.

    Attributes:
        path: of SVG; a new piece where values are missing.
        dots: (x, y) to be marked, where there are few.
    """

    name: str
    color: str
    path: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """
    Attributes:
        x_ticks, y_ticks: (position, text).
    """

    title: str
    x_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    bottom: float = HEIGHT - BOTTOM


def chart(
    title: str, x_label: str, lines: Sequence[tuple[str, np.ndarray, np.ndarray]]
) -> Chart | None:
    """A chart of several lines over one axis; None where there is nothing to draw.

    Args:
        lines: (name, x [n], y [n]); y from 0 up. What is not finite is left out.
    """
    kept = [(name, *_thinned(np.asarray(x, float), np.asarray(y, float))) for name, x, y in lines]
    kept = [(name, x, y) for name, x, y in kept if np.isfinite(y).sum() > 1]
    if not kept:
        return None
    xs = np.concatenate([x for _, x, _ in kept])
    ys = np.concatenate([y[np.isfinite(y)] for _, _, y in kept])
    low, high = float(xs.min()), float(xs.max())
    if low == high:
        return None
    y_ticks = ticks(min(0.0, float(ys.min())), float(ys.max()))
    bottom, top = y_ticks[0], y_ticks[-1]

    def at(x: float) -> float:
        return round(LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for color, (name, x, y) in zip(COLORS * len(kept), kept, strict=False):
        points = [(at(a), up(b)) if math.isfinite(b) else None for a, b in zip(x, y, strict=True)]
        dots = [point for point in points if point is not None]
        drawn.append(Line(name, color, _path(points), dots if len(dots) <= 40 else []))
    return Chart(
        title,
        x_label,
        drawn,
        [(at(x), _text(x)) for x in ticks(low, high) if low <= x <= high],
        [(up(y), _text(y)) for y in y_ticks],
    )


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Round numbers, about `number` of them, from `low` or below to `high` or above."""
    span = (high - low) or abs(high) or 1.0
    power: float = 10.0 ** math.floor(math.log10(span / number))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= span / number)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours where there are many points."""
    pieces = -(-len(x) // _POINTS)
    if pieces <= 1:
        return x, y
    cuts = np.arange(0, len(x), pieces)
    counts = np.diff([*cuts, len(x)])
    return np.add.reduceat(x, cuts) / counts, np.add.reduceat(y, cuts) / counts


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    words, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{point[0]:g} {point[1]:g}")
        pen = "L"
    return "".join(words)


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
