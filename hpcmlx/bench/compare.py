"""Runs the measurements in turn, several rounds, and compares them within each round.

Machines that share cores drift; a ratio of two runs that follow each other does not. Every number
is the median over the rounds. `jobs/bench.py` calls this.
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
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One measurement: a process, or ranks, running `hpcmlx.bench.measure`."""

    engine: str
    options: tuple[str, ...] = ()
    ranks: int = 1
    blas: str = ""

    def run(self, model: str) -> Result:
        """Measure in processes of its own, one BLAS thread each."""
        argv = [sys.executable, "-m", "hpcmlx.bench.measure", self.engine, model, *self.options]
        if self.ranks > 1:
            mpirun = [find_mpirun(), "-n", str(self.ranks), "--oversubscribe", "--bind-to", "none"]
            argv = [*mpirun, *(["--allow-run-as-root"] if os.geteuid() == 0 else []), *argv]
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HPCMLX_BLAS": self.blas}
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


CASES = {
    "one": Case("hpcmlx"),
    "mlx-lm": Case("mlx-lm"),
    "stock": Case("mlx-lm", blas="none"),
    "tp2": Case("hpcmlx", ("--tp", "2"), ranks=2),
    "batch8": Case("hpcmlx", ("--batch", "8", "--no-prefill")),
    "pp2": Case("hpcmlx", ("--pp", "2", "--batch", "8", "--no-prefill"), ranks=2),
}


@dataclass(frozen=True)
class Comparison:
    """A line of the table: figure `key` of case `ours` over that of case `theirs`."""

    label: str
    key: str
    ours: str
    theirs: str
    goal: str


COMPARISONS = (
    Comparison("decode, 1 row: one rank / mlx-lm, same BLAS", "decode", "one", "mlx-lm", "≥ 1.0"),
    Comparison("prefill: one rank / mlx-lm, same BLAS", "prefill", "one", "mlx-lm", "≥ 1.0"),
    Comparison("decode, 1 row: one rank / mlx-lm as installed", "decode", "one", "stock", ""),
    Comparison("prefill: one rank / mlx-lm as installed", "prefill", "one", "stock", "≥ 10"),
    Comparison("decode, 1 row: tp2 / one rank", "decode", "tp2", "one", "≥ 1.6"),
    Comparison("prefill: tp2 / one rank", "prefill", "tp2", "one", ""),
    Comparison(
        "decode, microbatches of 8: pp2 with two / one rank with one",
        "decode", "pp2", "batch8", "≥ 1.6",
    ),
)  # fmt: skip


def compare(model: str, rounds: int, progress: Callable[[str], None]) -> str:
    """Measure and return the tables as Markdown.

    Args:
        model: directory of a float32 checkpoint.
        progress: told what is measured next.
    """
    measured: dict[str, list[Result]] = {name: [] for name in CASES}
    for number in range(1, rounds + 1):
        for name, case in CASES.items():
            progress(f"round {number} of {rounds}: {name}")
            measured[name].append(case.run(model))
    return f"{_speed_table(measured)}\n\n{_memory_table(measured)}\n"


def _speed_table(measured: dict[str, list[Result]]) -> str:
    lines = [
        "| | tok/s | tok/s | ratio | lowest–highest | goal |",
        "|---|---|---|---|---|---|",
    ]
    for c in COMPARISONS:
        ours = [result[c.key] for result in measured[c.ours]]
        theirs = [result[c.key] for result in measured[c.theirs]]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        lines.append(
            f"| {c.label} | {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} "
            f"| **{statistics.median(ratios):.2f}** | {min(ratios):.2f}–{max(ratios):.2f} "
            f"| {c.goal} |"
        )
    return "\n".join(lines)


def _memory_table(measured: dict[str, list[Result]]) -> str:
    lines = [
        "| rank | shard MiB | read / shard | peak RSS MiB | shard + largest tensor + base |",
        "|---|---|---|---|---|",
    ]
    for name in ("one", "tp2", "pp2"):
        for rank, r in enumerate(measured[name][-1]["ranks"]):
            bound = r["shard"] + r["largest_tensor"] + r["base_rss"]
            lines.append(
                f"| {name}, rank {rank} | {r['shard'] / MIB:.0f} "
                f"| {r['bytes_read'] / r['shard']:.2f} | {r['peak_rss'] / MIB:.0f} "
                f"| {bound / MIB:.0f} |"
            )
    return "\n".join(lines)
