"""What a run cost: gathered from all ranks, written to `summary.json`.

Every job's begins with the same head: job, layout, seconds, tokens, tokens_per_sec, energy,
joules_per_token, exit; all of the launch that has written it.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from hpcmlx.comm import Communicator, hostname
from hpcmlx.files import write_atomic
from hpcmlx.observe.energy import per_token

SUMMARY = "summary.json"


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
) -> list[dict[str, Any]] | None:
    """Write `summary.json`; `finish_summary` completes its head. Collective.

    Args:
        totals: numbers of the whole run, the "layout" among them; rank 0's count.
        per_rank: numbers of this rank; host and peak memory are added.
        seconds: that this launch has worked, without loading; rank 0's counts.
        num_tokens: generated, scored or trained on in that time; None: not counted.

    Returns:
        On rank 0 the table of ranks, elsewhere None.
    """
    mine = {"rank": world.rank, "host": hostname(), **per_rank, **peak_memory()}
    ranks = world.gather(mine)
    if ranks is not None:
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
