"""The end of a sweep, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

from hpcmlx.record import completion
from hpcmlx.sweep.points import Point, Sweep, metric, state


def rows(sweep: Sweep, points: Sequence[Point]) -> list[list[str]]:
    """What is swept, state, exit code, seconds and metric of every point, as text."""
    found = []
    for point in points:
        run_dir = sweep.run_dir(point)
        value = metric(run_dir, sweep.metric) if completion(run_dir) else None
        found.append(
            [
                *(point.overrides.get(key, "") for key in sweep.keys),
                state(sweep, point),
                "" if point.exit_code is None else str(point.exit_code),
                "" if point.seconds is None else f"{point.seconds:.1f}",
                "" if value is None else f"{value:.5g}",
            ]
        )
    return found


def best_point(sweep: Sweep, points: Sequence[Point]) -> Point | None:
    """Of the points with a metric the one where it is best; None where all have the same."""
    known = [(metric(sweep.run_dir(p), sweep.metric), p) for p in points]
    values = [(value, p) for value, p in known if value is not None]
    values = [(value, p) for value, p in values if completion(sweep.run_dir(p)) and value == value]
    sign = -1 if sweep.direction == "maximize" else 1
    if len({value for value, _ in values}) < 2:
        return None
    return min(values, key=lambda pair: sign * pair[0])[1]


def show(sweep: Sweep, points: Sequence[Point], out: TextIO) -> None:
    """Print the table; of a point that is not complete also why."""
    table = Table(box=None, pad_edge=False)
    for key in sweep.keys:
        table.add_column(key)
    for name, justify in (("state", "left"), ("exit", "right"), ("seconds", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column(sweep.metric, justify="right")
    for row in rows(sweep, points):
        table.add_row(*row)
    console = Console(file=out, markup=False, highlight=False, width=None if out.isatty() else 160)
    console.print(table)
    if best := best_point(sweep, points):
        console.print(f"best: {best.name}")
    for point in points:
        if point.reason and not completion(sweep.run_dir(point)):
            console.print(f"{point.name}: {point.reason}", soft_wrap=True)
