"""The timeline of a run as a picture, `pipeline.png`: a lane per rank, idle time white.

`generate.py` draws it on rank 0 at the end of a run with `timeline=true`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcmlx.extras import require
from hpcmlx.figures import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, YELLOW, blank, png
from hpcmlx.observe.timeline import CODES, KINDS, SPAN, WAIT, Lane

#: The picture's file in a run directory.
PICTURE = "pipeline.png"

_PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)  # neighbours contrast
_DARK = (BLUE, GREEN, VERMILION)
_HOST = "#8A8A8A"
# What a stage does with a microbatch, which has the microbatch's colour; the rest is the host's.
_WORK = ("prefill", "decode", "forward", "backward")
_WORK_CODES = [CODES[kind] for kind in _WORK]
_HATCHED = ("prefill", "backward")
_MAX_SHOWN = 150  # spans in a lane; more cannot be told apart in a picture 1200 pixels wide


def require_matplotlib() -> None:
    """Call it before a run that shall be drawn.

    Raises:
        ConfigError: matplotlib is not installed here.
    """
    require("matplotlib", "plot", "timeline=true", "leave timeline out")


def draw(lanes: Sequence[Lane], layout: str) -> bytes:
    """A Gantt chart as PNG: a lane per rank, a colour per microbatch, idle white.

    Where a run has more spans than can be told apart, the chart shows some from its middle, and
    a strip above it how busy every lane was over the whole time.
    """
    seconds = shown_seconds(lanes) or 1.0
    begin, end = _window(lanes, seconds)
    zoomed = (begin, end) != (0.0, seconds)
    height = max(0.26, min(0.62, 7.0 / len(lanes))) * len(lanes)
    heights = [min(2.0, 0.3 * height), height] if zoomed else [height]
    total = sum(heights) + 1.9 + 0.5 * zoomed
    with blank(12, total, font_size=11, hatch_linewidth=1.1) as figure:
        axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        chart = axes[-1]
        pieces = [_pieces(lane.spans, begin, end) for lane in lanes]
        numbered = _numbered(np.concatenate(pieces), end - begin)
        for y, lane_pieces in enumerate(pieces):
            _draw_lane(chart, y, lane_pieces, numbered, end - begin)
        _label(chart, lanes, seconds)
        chart.set_xlim(begin, end)
        chart.set_xlabel("seconds")
        if zoomed:
            _draw_overview(axes[0], lanes, seconds, (begin, end))
        _draw_legend(figure, lanes)
        return png(figure, _title(lanes, layout, seconds), dpi=200)


def shown_seconds(lanes: Sequence[Lane]) -> float:
    """From the first span to the moment up to which every rank has kept its own."""
    ends = [(lane.is_full, lane.spans["end"].max()) for lane in lanes if len(lane.spans)]
    full = [end for is_full, end in ends if is_full]
    return float(min(full) if full else max((end for _, end in ends), default=0.0))


def busy_fraction(spans: np.ndarray, edges: Sequence[float] | np.ndarray) -> np.ndarray:
    """The share of time with some span and no "wait", between neighbouring `edges`.

    Args:
        spans: [n] of `SPAN`.
        edges: [k + 1] increasing times.

    Returns:
        [k], from 0 to 1.
    """
    waits = spans[spans["kind"] == WAIT]
    busy = np.diff(_covered(spans, edges)) - np.diff(_covered(waits, edges))
    return np.clip(busy / np.diff(edges), 0.0, 1.0)


def _covered(spans: np.ndarray, at: Sequence[float] | np.ndarray) -> np.ndarray:
    """Seconds before each of `at` that lie in one span or more."""
    if not len(spans):
        return np.zeros(len(at))
    spans = np.sort(spans, order="begin")
    ends = np.maximum.accumulate(spans["end"])
    begins = np.maximum(spans["begin"], np.concatenate([[-np.inf], ends[:-1]]))
    after = np.cumsum(ends - begins)
    times = np.stack([begins, ends], axis=1).ravel()
    covered = np.stack([after - (ends - begins), after], axis=1).ravel()
    return np.interp(at, times, covered)


def _window(lanes: Sequence[Lane], seconds: float) -> tuple[float, float]:
    """The part of the run to show: all of it, or so many spans of its fullest lane's middle."""
    begins = max((np.sort(lane.spans["begin"]) for lane in lanes), key=len)
    begins = begins[begins < seconds]
    if len(begins) <= _MAX_SHOWN:
        return 0.0, seconds
    first = (len(begins) - _MAX_SHOWN // 2) // 2
    return float(begins[first]), float(begins[first + _MAX_SHOWN // 2])


def _pieces(spans: np.ndarray, begin: float, end: float) -> np.ndarray:
    """What of the spans lies between `begin` and `end` and in no "wait"."""
    spans = np.sort(spans[(spans["end"] > begin) & (spans["begin"] < end)], order="begin")
    is_wait = spans["kind"] == WAIT
    waits, pieces = spans[is_wait], []
    for left, right, *what in spans[~is_wait].tolist():
        left, right = max(left, begin), min(right, end)
        for wait in waits[(waits["end"] > left) & (waits["begin"] < right)]:
            if wait["begin"] > left:
                pieces.append((left, wait["begin"], *what))
            left = max(left, wait["end"])
        if left < right:
            pieces.append((left, right, *what))
    return np.array(pieces, SPAN)


def _numbered(pieces: np.ndarray, seconds: float) -> list[int]:
    """The kinds whose pieces are mostly wide enough for the number of their slot."""
    widths = pieces["end"] - pieces["begin"]
    kinds = [code for code in _WORK_CODES if code in pieces["kind"]]
    return [c for c in kinds if np.median(widths[pieces["kind"] == c]) > seconds / 70]


def _draw_lane(
    axes: Any, y: int, pieces: np.ndarray, numbered: Sequence[int], seconds: float
) -> None:
    for slot, code in np.unique(pieces[["slot", "kind"]]):
        chosen = pieces[(pieces["slot"] == slot) & (pieces["kind"] == code)]
        axes.broken_barh(
            np.stack([chosen["begin"], chosen["end"] - chosen["begin"]], axis=1),
            (y - 0.42, 0.84),
            facecolor=_color(code, slot),
            hatch="////" if KINDS[code] in _HATCHED else None,
            edgecolor="white",
            linewidth=0.5,
        )
    for left, right, code, slot, _ in pieces[np.isin(pieces["kind"], numbered)].tolist():
        if right - left > seconds / 100:
            color = _color(code, slot)
            style: dict[str, Any] = {"color": "white" if color in _DARK else INK, "ha": "center"}
            if KINDS[code] in _HATCHED:  # no hatch behind the number
                style["bbox"] = {"facecolor": color, "linewidth": 0, "pad": 1.0}
            axes.text((left + right) / 2, y, str(slot), va="center_baseline", **style)


def _label(axes: Any, lanes: Sequence[Lane], seconds: float) -> None:
    """Which rank a lane is, at its left, and how busy it was, at its right."""
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_yticks(range(len(lanes)), _names(lanes))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for y, lane in enumerate(lanes):
        busy = busy_fraction(lane.spans, [0.0, seconds])[0]
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"{busy:.0%} busy", (1, y), (6, 0), va="center", weight="bold", **place)
        if y and lane.replica != lanes[y - 1].replica:
            axes.axhline(y - 0.5, color=INK, linewidth=0.8)


def _names(lanes: Sequence[Lane]) -> list[str]:
    replicas, tensor = (
        len({getattr(lane, axis) for lane in lanes}) > 1 for axis in ("replica", "tp")
    )
    return [
        f"replica {lane.replica}, " * replicas + f"stage {lane.stage}" + f", tp {lane.tp}" * tensor
        for lane in lanes
    ]


def _draw_overview(
    axes: Any, lanes: Sequence[Lane], seconds: float, window: tuple[float, float]
) -> None:
    """How busy each lane was over the whole run, and where the chart below is."""
    edges = np.linspace(0.0, seconds, 241)
    for y, lane in enumerate(lanes):
        busy = busy_fraction(lane.spans, edges)
        axes.axhspan(y - 0.45, y + 0.45, color="#EEEEEE", linewidth=0)
        axes.stairs(y + 0.45 - 0.9 * busy, edges, baseline=y + 0.45, fill=True, color="#5B6770")
    axes.axvspan(*window, color=VERMILION, alpha=0.5)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    axes.annotate("shown below", (sum(window) / 2, 1), (0, 3), color=VERMILION, **place)
    axes.set_xlim(0.0, seconds)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("whole run,\nbusy share", rotation=0, ha="right", va="center")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_legend(figure: Any, lanes: Sequence[Lane]) -> None:
    from matplotlib.patches import Patch

    used = np.concatenate([lane.spans for lane in lanes])
    used = used[used["kind"] != WAIT]
    work = used[np.isin(used["kind"], _WORK_CODES)]
    by_color: dict[str, list[str]] = {}
    for slot in np.unique(work["slot"]):
        by_color.setdefault(_PALETTE[slot % len(_PALETTE)], []).append(str(slot))
    patches = [
        Patch(facecolor=color, label=f"microbatch {', '.join(slots)}")
        for color, slots in by_color.items()
    ]
    for kind in (kind for kind in _WORK if CODES[kind] in work["kind"]):
        hatch = "////" if kind in _HATCHED else None
        patches.append(Patch(facecolor="#BBBBBB", hatch=hatch, edgecolor="white", label=kind))
    others = [KINDS[code] for code in np.unique(used["kind"]) if code not in _WORK_CODES]
    if others:
        patches.append(Patch(facecolor=_HOST, label=", ".join(others)))
    patches.append(Patch(facecolor="white", edgecolor=INK, linewidth=0.6, label="idle"))
    columns = -(-len(patches) // -(-len(patches) // 8))
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False)


def _title(lanes: Sequence[Lane], layout: str, seconds: float) -> str:
    busy = np.mean([busy_fraction(lane.spans, [0.0, seconds])[0] for lane in lanes])
    part = "the first " if any(lane.is_full for lane in lanes) else ""
    time = f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"
    return f"{layout}: {part}{time} s, {busy:.0%} busy"


def _color(code: int, slot: int) -> str:
    return _PALETTE[slot % len(_PALETTE)] if code in _WORK_CODES else _HOST
