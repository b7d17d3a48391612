"""Runs the measurements and makes the README's tables of them. `jobs/bench.py` calls this.

A ratio is the median of the ratios of neighbouring runs, one per round; never of two numbers taken
at different times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcmlx.launch.mpirun import find_mpirun

MIB = 2**20


def measure(model: str, *arguments: str, ranks: int = 1, blas: str = "") -> dict[str, Any]:
    """Run `hpcmlx.bench.measure` in processes of its own, one BLAS thread each."""
    argv = [sys.executable, "-m", "hpcmlx.bench.measure", arguments[0], model, *arguments[1:]]
    if ranks > 1:
        mpirun = [find_mpirun(), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
        argv = [*mpirun, *(["--allow-run-as-root"] if os.geteuid() == 0 else []), *argv]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HPCMLX_BLAS": blas}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@dataclass(frozen=True)
class Comparison:
    """A line of the table."""

    label: str
    ours: str
    theirs: str
    goal: str


COMPARISONS = (
    Comparison("one rank : mlx-lm, decode 1 row", "decode", "decode mlx-lm", "≥ 1.0"),
    Comparison("one rank : mlx-lm, prefill", "prefill", "prefill mlx-lm", "≥ 1.0"),
    Comparison("one rank : mlx-lm as installed, decode 1 row", "decode", "decode stock", ""),
    Comparison("one rank : mlx-lm as installed, prefill", "prefill", "prefill stock", "≥ 10"),
    Comparison("tp2 : one rank, decode 1 row", "tp2", "one", "≥ 1.6"),
    Comparison("tp2 : one rank, decode 1 row, hidden size 2048", "tp2 wide", "one wide", "≥ 1.6"),
    Comparison("tp2 : one rank, decode 8 rows", "tp2 8", "one 8", ""),
    Comparison("tp2 : one rank, prefill", "tp2 prefill", "one prefill", ""),
    Comparison("pp2, two microbatches of 8 : one rank, one of 8", "pp2 8", "one 8", "≥ 1.6"),
)


def compare(model: str, rounds: int, progress: Callable[[str], None]) -> str:
    """Measure and return the tables as Markdown.

    Args:
        model: directory of a float32 checkpoint.
        rounds: of every measurement, after one that does not count.
        progress: told what is measured next.
    """
    times = ("--rounds", str(rounds))
    progress("one rank against mlx-lm")
    paired = measure(model, "pair", *times)
    progress("mlx-lm as installed, with its reference BLAS")
    stock = measure(model, "mlx-lm", "--rounds", str(min(rounds, 2)), blas="none")["result"]
    progress("two ranks against one")
    series = measure(model, "scale", *times, ranks=2)["result"] | paired["result"]
    progress("two ranks against one, on wider layers")
    series |= measure("-", "wide", *times, ranks=2)["result"]
    for name, values in stock.items():
        series[f"{name} stock"] = [statistics.median(values)] * rounds
    progress("loading")
    loads = {
        "dp1_pp1_tp1": measure(model, "load"),
        "dp1_pp1_tp2": measure(model, "load", "tp", ranks=2),
        "dp1_pp2_tp1": measure(model, "load", "pp", ranks=2),
    }
    return f"BLAS: {paired['blas']}\n\n{_speed_table(series)}\n\n{_load_table(loads)}\n"


def _speed_table(series: dict[str, list[float]]) -> str:
    lines = ["| | tok/s | ratio | lowest–highest | goal |", "|---|---|---|---|---|"]
    for c in COMPARISONS:
        ours, theirs = series[c.ours], series[c.theirs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        lines.append(
            f"| {c.label} | {statistics.median(ours):.1f} : {statistics.median(theirs):.1f} "
            f"| **{statistics.median(ratios):.2f}** | {min(ratios):.2f}–{max(ratios):.2f} "
            f"| {c.goal} |"
        )
    return "\n".join(lines)


def _load_table(loads: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| layout, rank | shard | read : shard (≤ 1.1) | peak RSS | ≤ shard + largest + base |",
        "|---|---|---|---|---|",
    ]
    for layout, measured in loads.items():
        for rank, r in enumerate(measured["result"]):
            lines.append(
                f"| {layout}, {rank} | {r['shard'] / MIB:.0f} MiB | {r['read'] / r['shard']:.2f} "
                f"| {r['peak_rss'] / MIB:.0f} MiB | {r['bound'] / MIB:.0f} MiB |"
            )
    return "\n".join(lines)
