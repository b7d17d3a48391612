"""What a run cost: gathered from all ranks, written to `summary.json`."""

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
    world: Communicator, run_dir: Path, totals: Mapping[str, Any], per_rank: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Write `summary.json`. Collective.

    Args:
        totals: numbers of the whole run; rank 0's count.
        per_rank: numbers of this rank; host and peak memory are added.

    Returns:
        On rank 0 the table of ranks, elsewhere None.
    """
    mine = {"rank": world.rank, "host": hostname(), **per_rank, **peak_memory()}
    ranks = world.gather(mine)
    if ranks is not None:
        text = json.dumps({**totals, "ranks": ranks}, indent=2) + "\n"
        write_atomic(run_dir / "summary.json", text.encode())
    return ranks
