"""How a run goes, in a file that anybody may read meanwhile: `status.json`.

Every rank tells rank 0 its numbers as a `RankReport`, through a mailbox that never blocks; rank 0
combines the latest of each rank and replaces the file about once a second. Where a run was killed
its launcher sets it to failed. Without a launcher the last status stays behind: then `updated`
stands still and nobody holds the run directory's lock (`record.how_it_ended`). Only
`completed.json` means success.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcmlx.comm import hostname
from hpcmlx.errors import OutputError
from hpcmlx.observe.progress import seconds_left
from hpcmlx.record import STATUS
from hpcmlx.redact import scrub

#: Seconds that `recent` rates look back.
RECENT_SECONDS = 30.0

_log = logging.getLogger(__name__)


class State(StrEnum):
    """Where a run is."""

    LOADING = "loading"
    RUNNING = "running"
    FINISHING = "finishing"  # all rows are done, results are being written
    COMPLETE = "complete"
    STOPPED = "stopped"  # asked to, before all rows were done
    FAILED = "failed"


@dataclass(frozen=True)
class RankReport:
    """What a rank has done in this launch until now.

    Rows, tokens and active rows are the replica's, the same on all its ranks or 0 on those that
    do not count them.

    Attributes:
        num_rows: rows that are finished and recorded.
        generated_tokens, prompt_tokens: of finished and unfinished rows.
        waiting_seconds: of `elapsed_seconds`, spent waiting for other stages.
        kv_bytes, kv_budget: KV caches of this rank, now and at most.
        num_active: rows under way.
    """

    rank: int
    stage: int
    replica: int
    num_rows: int
    generated_tokens: int
    prompt_tokens: int
    waiting_seconds: float
    elapsed_seconds: float
    kv_bytes: int
    num_active: int
    kv_budget: int = 0

    @property
    def busy(self) -> float:
        """The share of its time that it did not wait."""
        if self.elapsed_seconds <= 0:
            return 0.0
        return min(1.0, max(0.0, 1 - self.waiting_seconds / self.elapsed_seconds))


@dataclass(frozen=True)
class Group:
    """What the ranks of one replica, or of all, come to.

    Attributes:
        stage_busy: stage -> mean busy fraction of its ranks; only stages that were heard of.
        busy: the mean over all ranks.
    """

    num_rows: int
    generated_tokens: int
    prompt_tokens: int
    num_active: int
    kv_bytes: int
    kv_budget: int
    busy: float
    stage_busy: Mapping[int, float]


def combine(reports: Mapping[int, RankReport]) -> tuple[Group, dict[int, Group]]:
    """The whole run and each replica, from the latest report of every rank that was heard of.

    Counts are taken once per replica, from the rank that is furthest: the reports of its ranks are
    a moment apart, and some ranks count nothing.
    """
    by_replica: dict[int, list[RankReport]] = {}
    for report in reports.values():
        by_replica.setdefault(report.replica, []).append(report)
    replicas = {
        replica: Group(
            max(r.num_rows for r in ranks),
            max(r.generated_tokens for r in ranks),
            max(r.prompt_tokens for r in ranks),
            max(r.num_active for r in ranks),
            *_over_ranks(ranks),
        )
        for replica, ranks in sorted(by_replica.items())
    }
    groups = replicas.values()
    everything = Group(
        sum(g.num_rows for g in groups),
        sum(g.generated_tokens for g in groups),
        sum(g.prompt_tokens for g in groups),
        sum(g.num_active for g in groups),
        *_over_ranks(list(reports.values())),
    )
    return everything, replicas


def _over_ranks(ranks: list[RankReport]) -> tuple[int, int, float, dict[int, float]]:
    by_stage: dict[int, list[float]] = {}
    for report in ranks:
        by_stage.setdefault(report.stage, []).append(report.busy)
    return (
        sum(r.kv_bytes for r in ranks),
        sum(r.kv_budget for r in ranks),
        _mean([r.busy for r in ranks]),
        {stage: _mean(busy) for stage, busy in sorted(by_stage.items())},
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class Rate:
    """Something per second: over the last 30 s or so, and since the first row began."""

    recent: float
    overall: float


@dataclass(frozen=True)
class Status:
    """The content of `status.json`.

    Attributes:
        started, updated: UTC, ISO 8601.
        num_done: rows that are safe, those of earlier launches included; `num_total` at the end.
        num_errors: rows of the input that cannot be done; not part of `num_total`.
        num_resumed: of `num_done`, done by earlier launches.
        eta_seconds: until the last row; None before the first.
        kv_bytes, kv_budget: over all ranks.
        stages, replicas: one entry each, replicas once they are heard of. `busy` is the share of
            its time that it did not wait, None for a stage that was not heard of.
        error: why it failed.
    """

    state: str
    layout: str
    host: str
    pid: int
    started: str
    updated: str
    elapsed_seconds: float
    num_done: int
    num_total: int
    num_errors: int
    num_resumed: int
    num_active: int
    eta_seconds: float | None
    rows_per_sec: Rate
    tokens_per_sec: Rate
    prompt_tokens_per_sec: Rate
    kv_bytes: int
    kv_budget: int
    stages: list[dict[str, Any]]
    replicas: list[dict[str, Any]]
    error: str | None = None


class StatusWriter:
    """Keeps `status.json` up to date on rank 0. A context manager: its end is the run's.

    The file is replaced by rename, so that a reader always sees a whole one, but not flushed to the
    disk: that would cost a step each second and buy nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_rows: int,
        layout: str,
        num_stages: int,
        already_done: int = 0,
        num_errors: int = 0,
        enabled: bool = True,
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            total_rows: rows that can be done; `num_errors` others cannot.
            layout: as in `dp1_pp2_tp2`.
            already_done: rows that earlier launches have done.
            enabled: False on every rank but 0: then nothing is written.
            interval: seconds between two writes, at least.
            clock: a monotonic clock, in seconds.

        Raises:
            OutputError: the file cannot be created.
        """
        self.num_errors = num_errors  # may grow while the run goes on
        self.stopped = False  # before all rows were done, because it was asked to
        self._path, self._layout, self._total = Path(run_dir, STATUS), layout, total_rows
        self._num_stages, self._already_done, self._enabled = num_stages, already_done, enabled
        self._interval, self._clock = interval, clock
        self._reports: dict[int, RankReport] = {}
        self._state = State.LOADING
        self._error: str | None = None
        self._started, self._begin = _utc_now(), clock()
        self._written = -float("inf")
        self._run_begin: float | None = None
        self._run_end: float | None = None
        #: (time, (rows, generated tokens, prompt tokens)) of the last half minute's writes.
        self._samples: deque[tuple[float, tuple[int, int, int]]] = deque()
        self._failing = False
        if enabled:
            try:
                self._write()
            except OSError as error:
                raise OutputError(f"cannot create {self._path}: {error.strerror}") from error

    def __enter__(self) -> StatusWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.set_state(State.STOPPED if self.stopped else State.COMPLETE)
        else:
            self._error = scrub(" ".join(f"{type(error).__name__}: {error}".split()))
            self.set_state(State.FAILED)

    @property
    def due(self) -> bool:
        """Whether `update` would write now: until then there is no need to ask for news."""
        return self._enabled and self._clock() - self._written >= self._interval

    def update(self, news: Iterable[tuple[int, RankReport]] = ()) -> Status | None:
        """Take in (rank, report) pairs as `Mailbox.poll` gives them; write if it is time.

        Returns:
            What was written, for the progress bar; None where it was not time.
        """
        self._reports.update(news)
        return self._try_to_write() if self.due else None

    def set_state(self, state: State, news: Iterable[tuple[int, RankReport]] = ()) -> Status | None:
        """Go on to `state` and write at once. Rates count the time in State.RUNNING only."""
        self._reports.update(news)
        self._state = state
        if state is State.RUNNING:
            self._run_begin = self._clock()
        elif self._run_begin is not None and self._run_end is None:
            self._run_end = self._clock()
        return self._try_to_write() if self._enabled else None

    def _try_to_write(self) -> Status | None:
        # The rows themselves are not here: a file system that fails ends the run when it loses one.
        try:
            status = self._write()
        except OSError as error:
            if not self._failing:
                _log.warning("cannot write %s: %s; the run goes on", self._path, error.strerror)
            self._failing, self._written = True, self._clock()
            return None
        self._failing = False
        return status

    def _write(self) -> Status:
        self._written = self._clock()
        status = self._status()
        temporary = self._path.with_name(f".{STATUS}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(status), indent=2) + "\n")
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return status

    def _status(self) -> Status:
        now = self._clock()
        everything, replicas = combine(self._reports)
        counts = (everything.num_rows, everything.generated_tokens, everything.prompt_tokens)
        done = self._already_done + everything.num_rows
        seconds = self._seconds_running(now)
        eta = None
        if self._state is State.RUNNING:
            eta = seconds_left(everything.num_rows, self._total - done, seconds)
            self._samples.append((now, counts))
            while len(self._samples) > 2 and now - self._samples[1][0] >= RECENT_SECONDS:
                self._samples.popleft()
        rows, tokens, prompt_tokens = (
            Rate(self._recent(i), round(count / seconds, 3) if seconds else 0.0)
            for i, count in enumerate(counts)
        )
        return Status(
            state=self._state,
            layout=self._layout,
            host=hostname(),
            pid=os.getpid(),
            started=self._started,
            updated=_utc_now(),
            elapsed_seconds=round(now - self._begin, 3),
            num_done=done,
            num_total=self._total,
            num_errors=self.num_errors,
            num_resumed=self._already_done,
            num_active=everything.num_active,
            eta_seconds=None if eta is None else round(eta, 1),
            rows_per_sec=rows,
            tokens_per_sec=tokens,
            prompt_tokens_per_sec=prompt_tokens,
            kv_bytes=everything.kv_bytes,
            kv_budget=everything.kv_budget,
            stages=[
                {"stage": stage, "busy": _rounded(everything.stage_busy.get(stage))}
                for stage in range(self._num_stages)
            ],
            replicas=[
                {"replica": replica, "busy": _rounded(group.busy), "num_rows": group.num_rows}
                | {"stages": [_rounded(group.stage_busy.get(i)) for i in range(self._num_stages)]}
                for replica, group in replicas.items()
            ],
            error=self._error,
        )

    def _seconds_running(self, now: float) -> float:
        if self._run_begin is None:
            return 0.0
        return (now if self._run_end is None else self._run_end) - self._run_begin

    def _recent(self, i: int) -> float:
        """Growth of count `i` per second over the samples kept."""
        if len(self._samples) < 2:
            return 0.0
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return round((last[i] - first[i]) / (end - begin), 3) if end > begin else 0.0


def _rounded(busy: float | None) -> float | None:
    return None if busy is None else round(busy, 4)


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
