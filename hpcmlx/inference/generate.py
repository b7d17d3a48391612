"""One launch of a generate job: what is still missing is answered and stored, then all rows are put
together. `jobs/generate.py` calls the three steps in turn.

A launch that was cut off is gone on with by the next one in the same run directory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcmlx import redact
from hpcmlx.comm import Mailbox
from hpcmlx.errors import ExitCode
from hpcmlx.files import write_atomic
from hpcmlx.inference import results, store
from hpcmlx.inference.engine import Engine, Stats
from hpcmlx.inference.inputs import Batch, read_batch
from hpcmlx.inference.manifest import Manifest, check
from hpcmlx.inference.request import max_context
from hpcmlx.inference.rows import Request, RowError, RowResult
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.inference.store import RowStore
from hpcmlx.mesh import Mesh
from hpcmlx.models.checkpoint import Checkpoint
from hpcmlx.models.gguf import GGUFCheckpoint
from hpcmlx.models.loader import LoadedModel, resolve_formats
from hpcmlx.observe import gantt
from hpcmlx.observe.memory import default_kv_budget
from hpcmlx.observe.progress import ProgressBar
from hpcmlx.observe.status import RankReport, State, StatusWriter
from hpcmlx.observe.stragglers import Meter
from hpcmlx.observe.timeline import OFF, Timeline
from hpcmlx.record import COMPLETED, completion
from hpcmlx.rundir import MANIFEST, check_room
from hpcmlx.settings import GenerateConfig
from hpcmlx.units import format_bytes, parse_bytes

_log = logging.getLogger(__name__)

_REQUESTS_AT_ONCE = 1024  # of a broadcast, so that no message is unbounded
_REPORT_SECONDS = 1.0
# Disk that a row takes: log, part, results.jsonl and results.h5, per token and apart from them.
_BYTES_PER_TOKEN, _BYTES_PER_LOGPROB, _BYTES_PER_ROW = 18, 64, 1024


@dataclass
class Work:
    """What a launch has to do.

    Attributes:
        requests: those without an answer yet, on every rank.
        num_done: answers of earlier launches.
        batch: the whole input, on rank 0.
        errors: on rank 0, rows that were refused after reading.
        complete: the exit code of an earlier launch that has finished everything.
    """

    requests: list[Request]
    num_done: int
    batch: Batch | None = None
    errors: list[RowError] = field(default_factory=list)
    complete: ExitCode | None = None


def find_work(
    cfg: GenerateConfig,
    mesh: Mesh,
    run_dir: Path,
    checkpoint: Checkpoint | GGUFCheckpoint,
    tokenizer: Any,
) -> Work:
    """Read the input, check that this run is what the directory was begun for, and find what it
    lacks. Collective; rank 0 reads.

    Raises:
        InputError: the input cannot be used as a whole.
        ConfigError: the run was begun with another input, model or sampling.
        OutputError: there is too little room for the results.
        IntegrityError: stored rows are damaged.
    """
    world, batch, requests = mesh.world, None, []
    if world.rank == 0:
        batch = _read(cfg, checkpoint, tokenizer)
        _enter(cfg, run_dir, checkpoint, batch)
    keys = store.committed_keys(world, run_dir / store.ROWS)
    if batch is not None and keys is not None:
        requests = [r for r in batch.requests if (r.index, r.sample) not in keys]
    complete = None
    if world.rank == 0:
        if requests:  # what it may say is not true any more
            (run_dir / COMPLETED).unlink(missing_ok=True)
        elif (record := completion(run_dir)) is not None:
            complete = ExitCode(record["exit_code"])
    num_done, complete, total = world.bcast((len(keys or ()), complete, len(requests)))
    mine: list[Request] = []
    for start in range(0, total, _REQUESTS_AT_ONCE):
        mine += world.bcast(requests[start : start + _REQUESTS_AT_ONCE])
    return Work(mine, num_done, batch, complete=complete)


def build_engine(
    cfg: GenerateConfig, mesh: Mesh, loaded: LoadedModel, tokenizer: Any, timeline: Timeline = OFF
) -> Engine:
    """The engine with its KV memory: as configured, else most of what the host has free.

    Raises:
        ConfigError: the KV memory cannot be read as a size, or KV caches cannot be packed.
    """
    options = vars(cfg.inference) | {"timeline": timeline}
    here = mesh.world.split_by_host().size
    mesh.world.barrier()  # everybody has loaded: what is free now stays free
    text = cfg.inference.kv_memory
    limit = default_kv_budget(here) if text is None else parse_bytes(text, "inference.kv_memory")
    _log.info("KV caches: up to %s on this rank", format_bytes(limit))
    return Engine(loaded, mesh, tokenizer, **options | {"kv_memory": limit})


def answer(
    work: Work,
    engine: Engine,
    mesh: Mesh,
    run_dir: Path,
    timeline: Timeline = OFF,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[Stats, float]:
    """Answer what is missing; every row is on the disk before it is counted. Collective.

    Args:
        asked_to_stop: whether this rank was asked to end before all rows are through.

    Returns:
        This rank's statistics, `stopped` being that of any rank, and the seconds from the first
        prefill to the last token.
    """
    _refuse_too_large(work, engine, mesh)
    recorder = Recorder(work, engine, mesh, run_dir)
    timeline.align(mesh.world)
    with recorder:
        begin = time.perf_counter()
        with Meter(mesh) as meter:
            stats = engine.run(work.requests, recorder.on_row, recorder.on_visit, asked_to_stop)
        computed = stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens
        stats.pace = meter.pace(computed)
        stats.stopped = bool(mesh.world.sum_numbers([stats.stopped])[0])
        seconds = time.perf_counter() - begin
        if stats.stopped:
            recorder.stopped()
    errors = mesh.world.gather(recorder.errors)
    if errors is not None:
        work.errors += _one_per_row(errors)
    place, layout = (mesh.dp, mesh.pp, mesh.tp), str(mesh.dims)
    if lanes := timeline.save(mesh.world, place, run_dir, layout):
        write_atomic(run_dir / gantt.PICTURE, gantt.draw(lanes, layout))
    return stats, seconds


def put_together(
    cfg: GenerateConfig,
    work: Work,
    mesh: Mesh,
    run_dir: Path,
    tokenizer: Any,
    loaded: LoadedModel,
    stats: Stats,
    seconds: float,
) -> ExitCode:
    """Write the results of all launches. Collective."""
    rows = store.collect(mesh.world, run_dir / store.ROWS)
    written = None
    if work.batch is not None:
        refused = {error.index for error in work.errors}
        model = redact.written("model.path", cfg.model.path, cfg.unresolved)
        written = results.write_results(
            run_dir,
            work.batch,
            (row for row in rows if row.index not in refused),
            tokenizer,
            {"model": model, "layout": str(mesh.dims)},
            work.errors,
        )
    if totals := results.summarize(mesh, run_dir, loaded, stats, seconds, written):
        _log.info("%s", results.describe(totals))
    num_errors = mesh.world.bcast(0 if written is None else written.errors)
    return ExitCode.ROW_ERRORS if num_errors else ExitCode.OK


def _read(cfg: GenerateConfig, checkpoint: Checkpoint | GGUFCheckpoint, tokenizer: Any) -> Batch:
    sampling = vars(cfg.sampling) | {"stop": tuple(cfg.sampling.stop)}
    n = sampling.pop("n")
    context = max_context(checkpoint.config)
    batch = read_batch(
        cfg.input, tokenizer, SamplingParams(**sampling), cfg.data, n=n, max_context=context
    )
    for error in batch.errors[:3]:
        _log.warning("%s", error.message)
    if len(batch.errors) > 3:
        _log.warning("… and %d more rows that cannot be answered", len(batch.errors) - 3)
    return batch


def _enter(
    cfg: GenerateConfig, run_dir: Path, checkpoint: Checkpoint | GGUFCheckpoint, batch: Batch
) -> None:
    """Begin the run, or see that it is the one that was begun."""
    dtype, weights = resolve_formats(cfg.model.dtype, cfg.model.weights)
    manifest = Manifest.build(
        cfg, checkpoint, input_sha256=batch.sha256, dtype=dtype, weights=weights
    )
    if (run_dir / MANIFEST).exists():
        for warning in check(run_dir, manifest):
            _log.warning("%s", warning)
        return
    need = len(batch.rows) * _BYTES_PER_ROW
    for sampling in (request.sampling for request in batch.requests):
        told = 0 if sampling.logprobs is None else 1 + sampling.logprobs
        need += sampling.max_tokens * (_BYTES_PER_TOKEN + told * _BYTES_PER_LOGPROB)
    check_room(run_dir, need, f"the results of {len(batch.rows)} rows")
    manifest.write(run_dir)


def _refuse_too_large(work: Work, engine: Engine, mesh: Mesh) -> None:
    """Take out rows that no replica, or not every one, has the memory for."""
    mine = {}
    for request in work.requests:
        if reason := engine.why_too_large(request):
            mine[request.index] = (request.id, reason)
    refused = {k: v for part in mesh.world.allgather(mine) for k, v in part.items()}
    work.requests = [r for r in work.requests if r.index not in refused]
    if mesh.world.rank == 0:
        lines = {row.index: row.line for row in work.batch.rows} if work.batch else {}
        work.errors += [
            RowError(index, row_id, lines.get(index), "kv_memory_exceeded", reason)
            for index, (row_id, reason) in sorted(refused.items())
        ]


class Recorder:
    """Stores a replica's rows as they end and tells how the run goes. A context manager.

    The recording rank of a replica is the first of its last stage, which knows tokens first and
    log-probabilities at all.
    """

    def __init__(self, work: Work, engine: Engine, mesh: Mesh, run_dir: Path):
        self._engine, self._mesh, self._root = engine, mesh, mesh.world.rank == 0
        self._records = mesh.is_last_stage and mesh.tp == 0
        self._store = RowStore(run_dir / store.ROWS, mesh.world.rank) if self._records else None
        self._ended: list[RowResult] = []  # not handed to the store yet
        self._num_rows = 0
        # The disk is waited for beside the model; one commit at a time.
        self._writer = ThreadPoolExecutor(1, "commit")
        self._commit: Future[int] | None = None
        self._reported = 0.0
        self.errors: list[tuple[int, RowError]] = []  # with the number of the sample
        self._mailbox = Mailbox(mesh.world)
        total = work.num_done + len(work.requests)
        num_errors = len(work.errors) + (len(work.batch.errors) if work.batch else 0)
        counts: dict[str, Any] = {"already_done": work.num_done, "num_errors": num_errors}
        self._bar = ProgressBar(total, "rows", self._root, **counts)
        self._status = StatusWriter(
            run_dir,
            total_rows=total,
            layout=str(mesh.dims),
            num_stages=mesh.dims.pp,
            enabled=self._root,
            **counts,
        )

    def __enter__(self) -> Recorder:
        self._status.__enter__()
        self._bar.__enter__()
        self._status.set_state(State.RUNNING)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            if self._store is not None:
                while self._ended or self._commit:
                    self._store_ended(wait=True)
                self._store.close()
            self._report()
            if last := self._status.set_state(State.FINISHING, self._mailbox.close()):
                self._bar.set(last.num_done, last.tokens_per_sec.overall, last.num_errors)
                if self._status.stopped:
                    counts = last.num_done, last.num_total
                    _log.info("asked to stop: %d of %d rows are done", *counts)
        self._bar.__exit__(kind, error, trace)
        self._status.__exit__(kind, error, trace)

    def stopped(self) -> None:
        """The launch ends before all rows are through."""
        self._status.stopped = True

    def on_row(self, row: RowResult) -> None:
        """A row of this replica has ended; on each of its ranks."""
        if self._root:
            self._bar.show(row.id, row.text)
        if self._records:
            self._ended.append(row)

    def on_visit(self) -> None:
        """Between two pieces of work: commit, report."""
        if self._store is not None:
            self._store_ended()
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report()
        if self._root and self._status.due and (now := self._status.update(self._mailbox.poll())):
            self._bar.set(now.num_done, now.tokens_per_sec.recent, now.num_errors)

    def _store_ended(self, wait: bool = False) -> None:
        """Count the rows of the commit under way, if it is through, and start the next one."""
        if self._commit is not None and (wait or self._commit.done()):
            self._num_rows += self._commit.result()
            self._commit = None
        if self._ended and self._commit is None:
            rows, self._ended = self._ended, []
            failed = [row for row in rows if row.finish_reason == "error"]
            self.errors += [(row.sample, _not_finite(row)) for row in failed]
            self._commit = self._writer.submit(self._commit_rows, rows)

    def _commit_rows(self, rows: list[RowResult]) -> int:
        self._store.commit([row for row in rows if row.finish_reason != "error"])
        return len(rows)

    def _report(self) -> None:
        self._reported = time.monotonic()
        stats, mesh = self._engine.stats, self._mesh
        counts = self._records
        self._mailbox.post(
            RankReport(
                mesh.world.rank,
                mesh.pp,
                mesh.dp,
                self._num_rows,
                stats.generated_tokens if counts else 0,
                stats.prompt_tokens if counts else 0,
                stats.idle_seconds,
                stats.seconds,
                self._engine.kv_bytes,
                stats.num_active if counts else 0,
                self._engine.budget.limit,
            )
        )


def _one_per_row(parts: Sequence[Sequence[tuple[int, RowError]]]) -> list[RowError]:
    """What every replica's recorder found, as (sample, error): of each row the lowest sample's."""
    found = [pair for part in parts for pair in part]
    first: dict[int, RowError] = {}
    for _, error in sorted(found, key=lambda pair: (pair[1].index, pair[0])):
        first.setdefault(error.index, error)
    return list(first.values())


def _not_finite(row: RowResult) -> RowError:
    return RowError(
        row.index,
        row.id,
        None,
        "not_finite",
        f"the model's logits are not finite after {len(row.tokens) - 1} tokens of sample "
        f"{row.sample}; try model.dtype=float32",
    )
