"""Draws what the link bench has measured: hosts by hosts, and collectives over sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcmlx.bench.link_file import Links
from hpcmlx.bench.link_verdict import format_rate, slow_links
from hpcmlx.extras import require
from hpcmlx.figures import BLUE, GREEN, INK, VERMILION, blank, plain, png

_COLORS = {"mpi4py": BLUE, "mlx": VERMILION, "jaccl": GREEN}


def draw(links: Links) -> bytes:
    """Bandwidth and latency of each pair of hosts, and the collectives' curves, as PNG.

    Raises:
        ConfigError: matplotlib is not installed here.
    """
    require("matplotlib", "plot", "a picture of the links", "leave it out")
    with blank(13, 4.4, font_size=11) as figure:
        rate, late, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.35])
        _heatmap(rate, links, links.bandwidth, "bandwidth, row to column", format_rate, "YlGn")
        _heatmap(late, links, links.latency_best, "latency, one way, at best", _seconds, "YlOrRd")
        _curves(curves, links)
        return png(figure, _title(links), dpi=100)


def _heatmap(axes: Any, links: Links, values: np.ndarray, title: str, form: Any, name: str) -> None:
    from matplotlib.colors import LogNorm

    there = values[np.isfinite(values)]
    low, high = there.min(), there.max()
    # Never a whole scale for what differs by a few percent.
    middle, span = np.sqrt(low * high), max(np.sqrt(high / low), 2.0)
    axes.imshow(values, cmap=name, norm=LogNorm(middle / span, middle * span))
    numbers = range(len(links.hosts))
    axes.set_xticks(numbers, links.hosts, rotation=0 if len(links.hosts) < 6 else 90)
    axes.set_yticks(numbers, links.hosts)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=12)
    for row in numbers:
        for column in numbers:
            if np.isfinite(values[row, column]):
                text = form(values[row, column]).replace(" ", "\n")
                dark = np.log(values[row, column] / middle) > 0.35 * np.log(span)
                color = "white" if dark else INK
                size = 11 if len(links.hosts) < 6 else 7
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)


def _curves(axes: Any, links: Links) -> None:
    for name, curve in links.curves.items():
        operation, _, through = name.partition(" ")
        style = "-" if operation == "all_reduce" else "--"
        label = f"{operation.replace('_', '-')}, {through}"
        color = _COLORS.get(through, INK)
        axes.fill_between(links.sizes, curve[:, 0], curve[:, 2], color=color, alpha=0.15, lw=0)
        axes.plot(links.sizes, curve[:, 1], style, color=color, lw=2, marker="o", ms=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    wanted = [8, 512, 32 << 10, 2 << 20, 64 << 20]
    axes.set_xticks(wanted, ["8 B", "512 B", "32 KiB", "2 MiB", "64 MiB"])
    ticks = 10.0 ** np.arange(-6, 2)
    axes.set_yticks(ticks, [_seconds(tick) for tick in ticks])
    medians = np.concatenate([curve[:, 1] for curve in links.curves.values()])
    axes.set_ylim(0.5 * np.nanmin(medians), 2 * np.nanmax(medians))
    axes.set_title(f"collectives of {sum(links.ranks)} ranks", loc="left", fontsize=12)
    axes.set_xlabel("bytes that each rank gives")
    plain(axes)
    axes.legend(loc="upper left", facecolor="white", edgecolor="none", framealpha=1)


def _title(links: Links) -> str:
    slow = slow_links(links.latency_best, links.bandwidth)
    if not slow:
        return f"Links of {len(links.hosts)} hosts"
    ends = [(s.host, *s.peers) if len(s.peers) == 1 else (s.host,) for s in slow]
    names = [" - ".join(links.hosts[host] for host in hosts) for hosts in ends]
    said = ", ".join(dict.fromkeys(names))
    return f"Links of {len(links.hosts)} hosts: {said} {'is' if len(ends) == 1 else 'are'} slow"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
