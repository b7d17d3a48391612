"""Several runs in one picture: their loss over steps, and a number of each over what differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcmlx.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, blank, plain, png
from hpcmlx.observe.compare import Run
from hpcmlx.observe.curves import require_matplotlib, smooth

#: The picture's file in a sweep's directory.
PICTURE = "compare.png"

# More runs than these repeat them, dashed.
_COLORS = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY]
_SMOOTHED = 40  # rows from which on a line is smoothed
_MOST = 16  # runs whose lines are told apart by a legend


def draw(runs: Sequence[Run], keys: Sequence[str], metric: str | None, title: str = "") -> bytes:
    """The picture as PNG.

    Args:
        keys: the settings that differ.
        metric: the number that is drawn over them; None where no run has any.

    Raises:
        ConfigError: matplotlib is not installed here.
    """
    require_matplotlib()
    lines = any("loss" in run.curves.get("train", {}) for run in runs)
    count = max(int(lines) + int(metric is not None), 1)
    with blank(6.5 * count, 4.6, font_size=11) as figure:
        axes = list(np.ravel(figure.subplots(1, count)))
        if lines:
            _draw_curves(axes[0], runs, keys)
        if metric is not None:
            _draw_metric(axes[-1], runs, keys, metric)
        for one in axes:
            plain(one)
        return png(figure, title, dpi=110)


def label(run: Run, keys: Sequence[str]) -> str:
    """A run by what differs, in few words; one that is not complete says so."""
    parts = [f"{key.rpartition('.')[2]} {run.settings.get(key)}" for key in keys]
    text = ", ".join(parts) or run.name
    return text if run.complete else f"{text} ({run.state})"


def _draw_curves(axes: Any, runs: Sequence[Run], keys: Sequence[str]) -> None:
    for i, run in enumerate(runs):
        color = _COLORS[i % len(_COLORS)]
        style = "-" if run.complete and i < len(_COLORS) else "--" if run.complete else ":"
        train, evaluation = run.curves.get("train", {}), run.curves.get("eval", {})
        if "loss" in train:
            values = train["loss"]
            if len(values) >= _SMOOTHED:
                values = smooth(values, 2 * max(2, len(values) // 50) + 1)
            axes.plot(train["step"], values, style, color=color, label=label(run, keys))
        if "loss" in evaluation:
            axes.plot(evaluation["step"], evaluation["loss"], "o", color=color, markersize=5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (points: evaluation)")
    axes.set_yscale("log")
    if len(runs) <= _MOST:
        axes.legend(fontsize=9, frameon=False)


def _draw_metric(axes: Any, runs: Sequence[Run], keys: Sequence[str], metric: str) -> None:
    """Lines over the first number that differs, one for each value of the others; bars where there
    is no such number."""
    known = [run for run in runs if metric in run.numbers]
    numeric = [key for key in keys if all(_is_number(run.settings.get(key)) for run in known)]
    axes.set_ylabel(metric)
    if not numeric or len({run.settings[numeric[0]] for run in known}) < 2:
        colors = [_COLORS[i % len(_COLORS)] for i in range(len(known))]
        values = [run.numbers[metric] for run in known]
        axes.barh([label(run, keys) for run in known], values, color=colors)
        axes.invert_yaxis()
        axes.set_ylabel("")
        axes.set_xlabel(metric)
        return
    over, others = numeric[0], [key for key in keys if key != numeric[0]]
    groups: dict[str, list[tuple[float, float]]] = {}
    for run in known:
        text = ", ".join(f"{key.rpartition('.')[2]} {run.settings.get(key)}" for key in others)
        groups.setdefault(text, []).append((run.settings[over], run.numbers[metric]))
    for i, (text, points) in enumerate(groups.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", color=_COLORS[i % len(_COLORS)], label=text or None)
    places = sorted({run.settings[over] for run in known})
    if places[0] > 0 and places[-1] / places[0] > 4:
        axes.set_xscale("log")
    if len(places) <= 8:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    axes.set_xlabel(over)
    if any(groups) and len(groups) <= _MOST:
        axes.legend(fontsize=9, frameon=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
