"""How far a run is: a bar on rank 0's terminal, a log line now and then elsewhere.

Answers are printed as they come while there are few rows; thousands would bury everything else.
mpirun gives ranks a terminal of its own even when its output goes to a file: `TERM=dumb` says so,
and `launch=mpirun` sets it by itself. Used by the jobs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

#: Up to so many rows each answer is printed.
FEW = 50
#: Seconds between log lines where there is no bar.
LINE_SECONDS = 10.0

_log = logging.getLogger(__name__)


class ProgressBar:
    """Counts done units and shows how long the rest will take. A context manager.

    Args:
        total: how many units there are.
        unit: what they are called.
        enabled: False on every rank but 0.
        already_done: units that an earlier launch has done.
        num_errors: units that cannot be done; not part of `total`.
        console: where the bar and the answers go; standard output if None.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        enabled: bool,
        *,
        already_done: int = 0,
        num_errors: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.unit, self.done, self.num_errors = total, unit, already_done, num_errors
        self._already_done, self._enabled, self._clock = already_done, enabled, clock
        self._tokens_per_sec: float | None = None
        self._console = console or Console()
        self._live = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._answers = enabled and total <= FEW
        columns = (
            TextColumn(unit),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[red]{task.fields[errors]}"),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[left]}"),
        )
        # Errors belong on stderr, even while the bar is up.
        self._progress = Progress(
            *columns, console=self._console, disable=not self._live, redirect_stderr=False
        )
        self._begin = self._last_line = clock()
        self._task = self._progress.add_task(
            unit, total=total, completed=self.done, **self._texts()
        )

    def __enter__(self) -> ProgressBar:
        self._begin = self._last_line = self._clock()
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
        self.done += count
        self._refresh()

    def set(
        self, done: int, tokens_per_sec: float | None = None, num_errors: int | None = None
    ) -> None:
        """Say how many units are done by now, those of other replicas included; never fewer than
        were counted here.

        Args:
            tokens_per_sec: shown in place of units a second.
            num_errors: units that have turned out impossible; None: no change.
        """
        self.done, self._tokens_per_sec = max(self.done, done), tokens_per_sec
        if num_errors is not None:
            self.num_errors = num_errors
        self._refresh()

    def show(self, title: str, body: str) -> None:
        """Count a unit and, where there are few, print a titled text; markup stays text."""
        self.advance()
        if self._answers:
            heading = Text(f"{title}  ({self.done}/{self.total})", style="bold cyan")
            self._console.print(heading, Text(body), "", sep="\n")

    def _refresh(self) -> None:
        if self._live:
            self._progress.update(self._task, completed=self.done, **self._texts())
            return
        now = self._clock()
        if self._enabled and not self._answers and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            share = self.done / max(self.total, 1)
            head = f"{self.unit} {self.done}/{self.total} ({share:.0%})"
            _log.info("%s", ", ".join([head, *filter(None, self._texts().values())]))

    def _texts(self) -> dict[str, Any]:
        seconds = self._clock() - self._begin
        fresh = self.done - self._already_done
        if self._tokens_per_sec is not None:
            rate = f"{self._tokens_per_sec:.1f} tok/s"
        else:
            rate = f"{fresh / seconds:.1f} {self.unit}/s" if fresh and seconds else ""
        left = seconds_left(fresh, self.total - self.done, seconds)
        return {
            "rate": rate,
            "errors": _count(self.num_errors, "error") if self.num_errors else "",
            "left": "" if left is None else f"{timedelta(seconds=round(left))} left",
        }


def seconds_left(done: int, left: int, seconds: float) -> float | None:
    """How long `left` units will take if `done` took `seconds`; None before the first is done."""
    if left <= 0:
        return 0.0
    return seconds / done * left if done > 0 else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
