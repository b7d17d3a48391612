"""A progress bar with answers above it on rank 0, silence on the others.

Where the output is not a terminal there is no bar; each answer then says how far the run is. mpirun
gives ranks a terminal of its own even when its output goes to a file: `TERM=dumb` says so, and
`launch=mpirun` sets it by itself.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class ProgressBar:
    """Counts done units and shows text above the bar. A context manager.

    Args:
        total: how many units there are.
        unit: what they are called.
        enabled: False on every rank but 0.
    """

    def __init__(self, total: int, unit: str, enabled: bool):
        columns = (
            TextColumn(unit),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # Errors belong on stderr, even while the bar is up.
        self._progress = Progress(
            *columns, console=Console(), disable=not enabled, redirect_stderr=False
        )
        self._task = self._progress.add_task(unit, total=total)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units."""
        self._progress.update(self._task, advance=count)

    def show(self, title: str, body: str) -> None:
        """Count one unit and print a titled text above the bar, markup in it not interpreted."""
        self.advance()
        if self._progress.disable:
            return
        task = self._progress.tasks[self._task]
        heading = Text(f"{title}  ({task.completed:.0f}/{task.total:.0f})", style="bold cyan")
        self._progress.console.print(heading, Text(body), "", sep="\n")
