"""A progress bar with answers above it on rank 0, silence on the others."""

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
            TextColumn("{task.fields[rate]}"),
        )
        self._progress = Progress(*columns, console=Console(), disable=not enabled)
        self._task = self._progress.add_task(unit, total=total, rate="")

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

    def advance(self, count: int = 1, rate: str = "") -> None:
        """Count `count` more units; `rate` is shown behind the bar."""
        self._progress.update(self._task, advance=count, rate=rate)

    def show(self, title: str, body: str) -> None:
        """Print a titled text above the bar. Markup in it is not interpreted."""
        if not self._progress.disable:
            self._progress.console.print(Text(title, style="bold cyan"), Text(body), "", sep="\n")
