"""A training run as a picture, `curves.png`: loss and throughput over steps.

The trainer draws it on rank 0 at the end of a run, from what `metrics.read_metrics` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hpcmlx.extras import require
from hpcmlx.figures import BLUE, GREEN, VERMILION, blank, plain, png

#: The picture's file in a run directory.
PICTURE = "curves.png"

_TRAIN, _EVAL, _SPEED = BLUE, VERMILION, GREEN
_SMOOTHED = 40  # rows from which on a smooth line is drawn over the raw one


def require_matplotlib() -> None:
    """Call it before a run whose curves shall be drawn.

    Raises:
        ConfigError: matplotlib is not installed here.
    """
    require("matplotlib", "plot", "a picture of a run's curves", "leave it out")


def draw(metrics: Mapping[str, Mapping[str, np.ndarray]], title: str = "") -> bytes:
    """Loss of training and evaluation above, tokens per second below, as PNG.

    Args:
        metrics: as `read_metrics` gives it; "loss" and "tokens_per_sec" are drawn, where there.
        title: what the run is, as in `dp2_pp2_tp1`.

    Raises:
        ConfigError: matplotlib is not installed here.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    train, evaluation = metrics.get("train", {}), metrics.get("eval", {})
    with blank(10, 7, font_size=12) as figure:
        loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        if "loss" in train:
            _line(loss, train["step"], train["loss"], _TRAIN, "training")
        if "loss" in evaluation:
            points = {"marker": "o", "markersize": 6, "label": "evaluation", "zorder": 3}
            loss.plot(evaluation["step"], evaluation["loss"], color=_EVAL, linewidth=2, **points)
        if "tokens_per_sec" in train:
            _line(speed, train["step"], train["tokens_per_sec"], _SPEED, "")
        loss.set_ylabel("loss")
        if loss.lines:
            loss.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=1)
        speed.set_ylabel("tokens per second")
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_formatter("{x:,.0f}")
        speed.set_xlabel("optimizer step")
        speed.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axes in (loss, speed):
            plain(axes)
        heading = ": ".join(filter(None, (title, _summary(train, evaluation))))
        return png(figure, heading, dpi=150)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Moving mean over `window` values around each, fewer at the ends; NaN counts as absent.

    Args:
        values: [n].
        window: odd.

    Returns:
        [n]; NaN where all values around are.
    """
    there = np.isfinite(values)
    half = window // 2
    begins = np.maximum(np.arange(len(values)) - half, 0)
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    number = counts[ends] - counts[begins]
    mean = (sums[ends] - sums[begins]) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)


def _line(axes: Any, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """The raw line; faint, and a smooth one over it, where it has many points."""
    if len(values) < _SMOOTHED:
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=label)
        return
    window = 2 * max(2, len(values) // 50) + 1
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth(values, window), color=color, linewidth=2.2, label=label)


def _summary(train: Mapping[str, np.ndarray], evaluation: Mapping[str, np.ndarray]) -> str:
    """The run in half a line."""
    parts = []
    for name, columns in (("loss", train), ("evaluation", evaluation)):
        losses = columns.get("loss", np.empty(0))
        losses = losses[np.isfinite(losses)]
        if len(losses):
            parts.append(f"{name} {losses[0]:.3g} \N{RIGHTWARDS ARROW} {losses[-1]:.3g}")
    speeds = train.get("tokens_per_sec", np.empty(0))
    speeds = speeds[np.isfinite(speeds)]
    if len(speeds):
        parts.append(f"{np.median(speeds):,.0f} tok/s")
    return ", ".join(parts)
