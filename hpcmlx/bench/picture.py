"""Draws decode speed over the number of rows under its roofs: docs/throughput.png."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcmlx.figures import BLUE, GREEN, VERMILION, blank, plain, png

_ENGINE, _GEMM, _READ = BLUE, VERMILION, GREEN


def draw(curve: dict[str, Any]) -> bytes:
    """A PNG of what `roofs.curve` has measured: medians, and the range over the rounds."""
    rows = np.array(curve["batches"])
    engine, gemm = (np.array(curve[side]) for side in ("engine", "gemm"))
    read = rows / np.median(curve["read_seconds"])
    speed, roof = np.median(engine, 0), np.median(gemm, 0)
    bandwidth = curve["weight_bytes"] / np.median(curve["read_seconds"]) / 1e9
    with blank(10, 6.2, font_size=12) as figure:
        axes = figure.subplots()
        axes.plot(rows, read, color=_READ, linewidth=2, linestyle="--")
        axes.plot(rows, roof, color=_GEMM, linewidth=2)
        axes.fill_between(rows, engine.min(0), engine.max(0), color=_ENGINE, alpha=0.2, linewidth=0)
        axes.plot(rows, speed, color=_ENGINE, linewidth=2.5, marker="o", markersize=7)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(rows, [str(n) for n in rows])
        top = 2 * max(roof.max(), speed.max())  # the line of the weights goes on far above
        axes.set_ylim(0.7 * speed.min(), top)
        ticks = 2 ** np.arange(np.ceil(np.log2(0.7 * speed.min())), np.floor(np.log2(top)) + 1)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("rows that decode together")
        axes.set_ylabel("new tokens per second")
        plain(axes)
        place: Any = {"textcoords": "offset points", "xytext": (0, -19), "ha": "center"}
        for x, y in zip(rows, speed, strict=True):
            axes.annotate(f"{y:.3g}", (x, y), color=_ENGINE, **place)
        axes.plot([], [], color=_ENGINE, marker="o", linewidth=2.5, label="hpcmlx")
        axes.plot([], [], color=_GEMM, linewidth=2, label="its matrix products alone")
        axes.plot(
            [],
            [],
            color=_READ,
            linewidth=2,
            linestyle="--",
            label=f"reading the weights alone ({bandwidth:.1f} GB/s)",
        )
        axes.legend(loc="lower right", facecolor="white", edgecolor="none", framealpha=1)
        share = (speed / np.minimum(roof, read)).max()
        title = f"Decode over batch size: up to {share:.0%} of what its matrix products allow"
        return png(figure, title, dpi=150)
