"""What a run cost: gathered from all ranks, written to `summary.json`.

Every job's begins with the same head: job, layout, seconds, tokens, tokens_per_sec, energy,
joules_per_token, exit; all of the launch that has written it.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from hpcmlx.comm import Communicator, hostname
from hpcmlx.files import write_atomic
from hpcmlx.observe import stragglers
from hpcmlx.observe.energy import per_token
from hpcmlx.observe.stragglers import Pace

SUMMARY = "summary.json"

_log = logging.getLogger(__name__)


def peak_rss() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory() -> dict[str, int]:
    """What a rank needed at most, in bytes: resident memory and, on a Metal GPU, MLX's arrays,
    which need not show up as resident."""
    peak = {"peak_rss_bytes": peak_rss()}
    if mx.metal.is_available():
        peak["peak_metal_bytes"] = mx.get_peak_memory()
    return peak


def write_summary(
    world: Communicator,
    run_dir: Path,
    totals: Mapping[str, Any],
    per_rank: Mapping[str, Any],
    *,
    seconds: float,
    num_tokens: int | None,
    pace: Pace | None = None,
) -> list[dict[str, Any]] | None:
    """Write `summary.json`; `finish_summary` completes its head. Collective.

    Args:
        totals: numbers of the whole run, the "layout" among them; rank 0's count.
        per_rank: numbers of this rank; host and peak memory are added.
        seconds: that this launch has worked, without loading; rank 0's counts.
        num_tokens: generated, scored or trained on in that time; None: not counted.
        pace: what this rank's time went into; None: no straggler is looked for.

    Returns:
        On rank 0 the table of ranks, elsewhere None.
    """
    mine = {"rank": world.rank, "host": hostname(), **per_rank, **peak_memory()}
    ranks = world.gather({**mine, "pace": pace})
    if ranks is not None:
        totals = {**totals, **_stragglers(ranks, [entry.pop("pace") for entry in ranks])}
        rate = None if num_tokens is None else round(num_tokens / max(seconds, 1e-9), 3)
        head = {
            "job": None,
            "layout": totals["layout"],
            "seconds": round(seconds, 3),
            "tokens": num_tokens,
            "tokens_per_sec": rate,
            "energy": None,
            "joules_per_token": None,
            "exit": None,
        }
        _write(run_dir, {**head, **totals, "ranks": ranks})
    return ranks


def _stragglers(ranks: Sequence[dict[str, Any]], paces: Sequence[Pace | None]) -> dict[str, Any]:
    """Give every rank its score; who is far behind the others is named, here and in the log."""
    known = [pace for pace in paces if pace is not None]
    if len(known) < len(paces):
        return {}
    found, reason = stragglers.scores(known)
    for entry, own, score in zip(ranks, stragglers.own_seconds(known), found, strict=True):
        entry["own_seconds"] = round(own, 3)
        entry["straggler_score"] = None if score is None else round(score, 2)
    worst = stragglers.slowest(known, found)
    if worst is not None:
        _log.warning(
            "straggler: rank %d on %s needs %.1f times as long for its part as the other ranks do; "
            "look at that host, or give it less (parallel.tp_shares, parallel.pp_layers)",
            worst,
            ranks[worst]["host"],
            found[worst],
        )
    return {"straggler": worst, "straggler_reason": reason}


def finish_summary(run_dir: Path, job: str, energy: Mapping[str, Any], exit: str) -> dict[str, Any]:
    """Complete the head that `write_summary` has begun; rank 0, once all ranks are through.

    Args:
        energy: of `energy.combine`.
        exit: as in "complete".

    Returns:
        The energy with its "joules_per_token".

    Raises:
        StorageError: the disk is full or failing.
    """
    found = json.loads((run_dir / SUMMARY).read_bytes())
    one = per_token(energy, found["tokens"])
    found |= {"job": job, "energy": dict(energy), "joules_per_token": one, "exit": exit}
    _write(run_dir, found)
    return {**energy, "joules_per_token": one}


def _write(run_dir: Path, found: Mapping[str, Any]) -> None:
    write_atomic(run_dir / SUMMARY, (json.dumps(found, indent=2) + "\n").encode())
