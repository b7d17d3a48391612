"""The link bench's numbers for people: tables, and one line for each slow link."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcmlx.bench.link_file import Links
from hpcmlx.bench.link_verdict import describe, format_rate, slow_links


def show(links: Links, console: Console) -> None:
    """Print them."""

    def rate(place: tuple[int, int]) -> str:
        low, high = links.bandwidth_quartiles[place]
        median = links.bandwidth[place]
        return f"{format_rate(median)} ± {(high - low) / 2 / median:.0%}"

    def late(place: tuple[int, int]) -> str:
        return (
            f"{format_seconds(links.latency_best[place])}, {format_seconds(links.latency[place])}"
        )

    title = "bandwidth, row to column: median ± half the span of the middle half"
    console.print(_matrix(links, title, rate))
    console.print(_matrix(links, "latency, one way: best, median", late))
    console.print(_collectives(links))
    for line in verdict(links):
        console.print(Text(line, style="bold red"), soft_wrap=True)
    console.print(Text(f"JACCL: {links.about.get('jaccl', '')}"), soft_wrap=True)


def verdict(links: Links) -> list[str]:
    """A line for each slow link; one that there is none, or that nothing can be compared."""
    slow = slow_links(links.latency_best, links.bandwidth)
    if slow:
        return [describe(s, links.hosts, links.kinds) for s in slow]
    if len(links.hosts) < 3:
        return [f"{len(links.hosts)} hosts: there is no other link to compare with"]
    return ["no link is slow beside the others"]


def format_seconds(seconds: float) -> str:
    """As in "12 µs", "3.4 ms" or "1.2 s"."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def _matrix(links: Links, title: str, cell: Callable[[tuple[int, int]], str]) -> Table:
    """Hosts by hosts; empty where nothing was measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for host in links.hosts:
        table.add_column(host, justify="right")
    for row, host in enumerate(links.hosts):
        places = [(row, column) for column in range(len(links.hosts))]
        there = [np.isfinite(links.latency[place]) for place in places]
        cells = [cell(place) if t else "" for place, t in zip(places, there, strict=True)]
        table.add_row(host, *cells)
    return table


def _collectives(links: Links) -> Table:
    title = f"collectives of {sum(links.ranks)} ranks, over the bytes that each gives"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in links.curves:
        table.add_column(name.replace("_", "-", 1), justify="right")
    for i, size in enumerate(links.sizes):
        times = [curve[i, 1] for curve in links.curves.values()]
        cells = [format_seconds(t) if np.isfinite(t) else "" for t in times]
        table.add_row(_size(int(size)), *cells)
    return table


def _size(num_bytes: int) -> str:
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << shift:
            return f"{num_bytes >> shift} {unit}"
    return f"{num_bytes} B"
