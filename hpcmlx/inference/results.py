"""Writes what a generate job leaves behind: `results.jsonl` for people, `results.h5` for programs,
`errors.jsonl` where rows could not be answered, and `summary.json` about the run.

Rows come in input order and are never all in memory; every file is whole or not there at all.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlx.errors import IntegrityError
from hpcmlx.files import atomic_writer, write_atomic, write_hdf5
from hpcmlx.flight import recorder
from hpcmlx.inference import openai
from hpcmlx.inference.columns import fill_columns
from hpcmlx.inference.engine import Stats
from hpcmlx.inference.inputs import Batch
from hpcmlx.inference.request import InputRow
from hpcmlx.inference.rows import RowError, RowResult
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.observe.summary import write_summary

RESULTS, ERRORS, COLUMNS = "results.jsonl", "errors.jsonl", "results.h5"
_LISTED = 10  # ids that a refusal names


@dataclass
class Written:
    """What all rows of a run, whichever launch computed them, come to.

    Attributes:
        rows: input rows that are answered.
        samples: answers.
        errors: input rows that are not.
        ttft, tpot: of each answer, in seconds; tpot only where there is a second token.
    """

    rows: int = 0
    samples: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    ttft: array[float] = field(default_factory=lambda: array("d"))
    tpot: array[float] = field(default_factory=lambda: array("d"))

    def add(self, sample: RowResult) -> None:
        self.samples += 1
        self.prompt_tokens += sample.num_prompt_tokens
        self.cached_tokens += sample.num_cached_tokens
        self.generated_tokens += len(sample.tokens)
        self.ttft.append(sample.ttft)
        if len(sample.tokens) > 1:
            self.tpot.append(sample.tpot)


def write_results(
    run_dir: Path,
    batch: Batch,
    results: Iterable[RowResult],
    tokenizer: Any,
    attributes: Mapping[str, Any],
    errors: Sequence[RowError] = (),
) -> Written:
    """Write `results.jsonl`, `results.h5` and, where there is something to say, `errors.jsonl`.

    Args:
        batch: the input; its own errors come first.
        results: all answers, by (index, sample); as `store.collect` gives them on rank 0.
        tokenizer: mlx-lm's TokenizerWrapper.
        attributes: what produced them ("model", "layout"), stored as HDF5 attributes.
        errors: rows that were refused only while the job ran.

    Raises:
        IntegrityError: the answers and errors are not one for each sample of the input; names ids.
            No file is written.
        OutputError, StorageError: a file cannot be created; the disk is full or failing.
    """
    refused = sorted([*batch.errors, *errors], key=lambda error: error.index)
    written = Written(errors=len(refused))
    wanted = _check_errors(batch, refused)
    with atomic_writer(run_dir / RESULTS) as write:

        def pass_on() -> Iterator[RowResult]:
            for row, samples in _answers(wanted, results):
                if batch.is_openai:
                    line = openai.output_line(row, samples, tokenizer, str(attributes["model"]))
                else:
                    line = plain_line(row, samples)
                write(_line(line))
                written.rows += 1
                for sample in samples:
                    written.add(sample)
                    recorder.tick()
                    yield sample

        write_hdf5(run_dir / COLUMNS, lambda file: fill_columns(file, pass_on(), attributes))
    if refused:
        make = openai.error_line if batch.is_openai else plain_error
        write_atomic(run_dir / ERRORS, b"".join(_line(make(error)) for error in refused))
    else:  # an earlier launch may have met some
        (run_dir / ERRORS).unlink(missing_ok=True)
    return written


def plain_line(row: InputRow, samples: Sequence[RowResult]) -> dict[str, Any]:
    """A line of `results.jsonl` for a row that was not OpenAI's: the answer itself, or a list
    of them where the row wanted several."""
    if row.n == 1:
        return {"id": row.id, **_answer(samples[0])}
    first = samples[0]
    answers = [{"sample": sample.sample, **_answer(sample)} for sample in samples]
    for answer in answers:
        del answer["num_prompt_tokens"]
    return {"id": row.id, "num_prompt_tokens": first.num_prompt_tokens, "samples": answers}


def plain_error(error: RowError) -> dict[str, Any]:
    """A line of `errors.jsonl` for a row that was not OpenAI's."""
    details = {"code": error.code, "message": error.message}
    return {"id": error.id, "line": error.line, "error": details}


def summarize(
    mesh: Mesh,
    run_dir: Path,
    loaded: LoadedModel,
    stats: Stats,
    seconds: float,
    written: Written | None,
) -> dict[str, Any] | None:
    """Write `summary.json`: all rows, the speed of this launch, a line for each rank. Collective.

    A run that was resumed has rows of several launches: the counts and latencies are those of all
    of them, what is under "this_launch" counts only what this one has computed.

    Args:
        seconds: of this launch, from the first prefill to the last token.
        written: what `write_results` gave; rank 0's counts.

    Returns:
        What was written but for the ranks, on world rank 0.
    """
    everyone = mesh.world.gather((mesh.pp, mesh.tp, stats))
    totals: dict[str, Any] = {}
    if everyone is not None and written is not None:
        totals = {
            "layout": str(mesh.dims),
            "rows": written.rows,
            "errors": written.errors,
            "samples": written.samples,
            "prompt_tokens": written.prompt_tokens,
            "cached_tokens": written.cached_tokens,
            "generated_tokens": written.generated_tokens,
            "ttft_seconds": _percentiles(written.ttft),
            "tpot_seconds": _percentiles(written.tpot),
            "this_launch": _speeds([s for pp, tp, s in everyone if pp == tp == 0], seconds),
            "stage_idle_percent": [
                _idle_percent([s for pp, _, s in everyone if pp == stage], seconds)
                for stage in range(mesh.dims.pp)
            ],
        }
    per_rank = {
        "place": str(mesh),
        "layers": [loaded.stage.start, loaded.stage.stop],
        "weight_bytes": loaded.num_bytes,
        "bytes_read": loaded.bytes_read,
        "steps": stats.num_steps,
        "idle_percent": _idle_percent([stats], seconds),
    }
    head = totals or {"layout": str(mesh.dims)}
    tokens = totals["this_launch"]["generated_tokens"] if totals else None
    cost: dict[str, Any] = {"seconds": seconds, "num_tokens": tokens, "pace": stats.pace}
    write_summary(mesh.world, run_dir, head, per_rank, **cost)
    return totals or None


def describe(totals: Mapping[str, Any]) -> str:
    """The line that ends a run."""
    launch = totals["this_launch"]
    earlier = totals["samples"] - launch["samples"]
    parts = [f"{totals['rows']} rows"]
    if totals["errors"]:
        parts.append(f"{totals['errors']} errors")
    if earlier:
        parts.append(f"{earlier} answers of an earlier launch")
    return (
        f"{', '.join(parts)}; {launch['prompt_tokens']} prompt + {launch['generated_tokens']} new "
        f"tokens in {launch['seconds']:.1f} s: {launch['tokens_per_sec']:.1f} tok/s "
        f"(prefill {launch['prefill_tokens_per_sec']:.0f} tok/s)"
    )


def _check_errors(batch: Batch, refused: Sequence[RowError]) -> list[InputRow]:
    """The rows that must have answers: those without an error."""
    indexes = {error.index for error in refused}
    known = {row.index: row.id for row in batch.rows}
    bad = [e.id for e in refused if known.get(e.index) != e.id]
    bad += [before.id for before, e in pairwise(refused) if before.index == e.index]
    bad += [row.id for row in batch.rows if row.errored and row.index not in indexes]
    if bad:
        raise IntegrityError(f"errors that do not fit the rows of the input: {_listing(bad)}")
    return [row for row in batch.rows if row.index not in indexes]


def _answers(
    wanted: Sequence[InputRow], results: Iterable[RowResult]
) -> Iterator[tuple[InputRow, list[RowResult]]]:
    """Each row with all of its samples; every row once."""
    missing: list[str] = []
    surplus: list[str] = []
    rows = iter(wanted)
    row = next(rows, None)
    for index, group in groupby(results, lambda result: result.index):
        samples = list(group)
        while row is not None and row.index < index:
            missing.append(row.id)
            row = next(rows, None)
        if row is None or row.index != index or any(s.id != row.id for s in samples):
            surplus.append(samples[0].id)
            continue
        found = [sample.sample for sample in samples]
        wanted_samples = range(row.n)
        if not set(wanted_samples) <= set(found):
            missing.append(row.id)
        elif found != list(wanted_samples):
            surplus.append(row.id)
        if not missing and not surplus:
            yield row, samples
        row = next(rows, None)
    missing += [row.id] if row is not None else []
    missing += [row.id for row in rows]
    problems = [f"no answer to {_listing(missing)}"] if missing else []
    problems += [f"answers that nobody asked for: {_listing(surplus)}"] if surplus else []
    if problems:
        raise IntegrityError(f"the stored rows are not those of the input: {'; '.join(problems)}")


def _answer(sample: RowResult) -> dict[str, Any]:
    answer = {
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "num_prompt_tokens": sample.num_prompt_tokens,
        "num_tokens": len(sample.tokens),
    }
    if sample.logprobs is not None:
        answer["logprobs"] = [
            {
                "token": token,
                "logprob": _finite(info.logprob),
                "top": [[other, _finite(logprob)] for other, logprob in info.top],
            }
            for token, info in zip(sample.tokens, sample.logprobs, strict=True)
        ]
    return answer


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _line(values: Mapping[str, Any]) -> bytes:
    # Half of a surrogate pair has no UTF-8.
    return (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _listing(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
    return ", ".join(f"{row_id:.60}" for row_id in ids[:_LISTED]) + more


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    points = np.percentile(values, (50, 90, 99)).tolist()
    return dict(zip(("p50", "p90", "p99"), points, strict=True))


def _speeds(replicas: Sequence[Stats], seconds: float) -> dict[str, Any]:
    """What this launch did; prefill and decode run side by side, each has its own clock."""
    counts = {
        name: sum(getattr(stats, name) for stats in replicas)
        for name in ("prompt_tokens", "cached_tokens", "generated_tokens")
    }
    prefill = max((stats.prefill_seconds for stats in replicas), default=0.0)
    decode = max((stats.decode_seconds for stats in replicas), default=0.0)
    computed = counts["prompt_tokens"] - counts["cached_tokens"]
    return {
        "samples": sum(stats.num_rows for stats in replicas),
        **counts,
        "seconds": seconds,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "tokens_per_sec": counts["generated_tokens"] / max(seconds, 1e-9),
        "prefill_tokens_per_sec": computed / max(prefill, 1e-9),
        "decode_tokens_per_sec": counts["generated_tokens"] / max(decode, 1e-9),
    }


def _idle_percent(ranks: Sequence[Stats], seconds: float) -> float:
    """Share of the time that ranks waited for other stages, on average."""
    return 100 * sum(stats.idle_seconds for stats in ranks) / (len(ranks) * max(seconds, 1e-9))
