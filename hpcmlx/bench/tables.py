"""The README's tables, as Markdown, of what the measurements gave.

A ratio is the median of the ratios of neighbouring runs, one per round; never of two numbers taken
at different times.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcmlx.bench.memory import MIB, Growth

Report = dict[str, dict[str, Any]]  # as `rows.report` gives it


@dataclass(frozen=True)
class Comparison:
    """A line of a table."""

    label: str
    ours: str
    theirs: str
    goal: str


SINGLE = (
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
BATCH = (Comparison("one rank : mlx-lm `BatchGenerator`", "hpcmlx", "mlx-lm", "≥ 1.1"),)
LAYOUTS = (
    Comparison("pp2 : one rank, as many rows in flight", "pp2", "one, twice the places", "≥ 1.7"),
    Comparison("pp2 : one rank, the same microbatches", "pp2", "one", ""),
    Comparison("dp2 : one rank, the same batches", "dp2", "one", "≥ 1.8"),
    Comparison("dp2 : one rank, as many rows in flight", "dp2", "one, twice the places", ""),
    Comparison("two processes apart : one rank, the same batches", "apart", "one", ""),
    Comparison("dp2 : two processes apart", "dp2", "apart", ""),
)
PIPELINE = (
    Comparison(
        "pp2 : mlx-lm's pipeline, all rows at once", "hpcmlx pp2", "mlx-lm pipeline", "≥ 1.5"
    ),
    Comparison(
        "pp2 : mlx-lm's pipeline, half at a time", "hpcmlx pp2", "mlx-lm pipeline, half", ""
    ),
)
SHARD = tuple(
    Comparison(f"tp2 : `shard()`, {what}", f"hpcmlx tp2, {what}", f"mlx-lm shard, {what}", "≥ 1.0")
    for what in ("decode 1 row", "decode 8 rows", "prefill")
)

TRAIN = (
    Comparison("one rank : mlx-lm, answers are learned", "hpcmlx", "mlx-lm", "≥ 1.0"),
    Comparison("one rank : mlx-lm without `mx.compile`", "hpcmlx", "mlx-lm, not compiled", ""),
    Comparison("… activations computed again", "hpcmlx, recompute", "mlx-lm, recompute", "≥ 1.0"),
    Comparison("… all tokens are learned", "hpcmlx, all targets", "mlx-lm, all targets", ""),
)
TRAIN_LAYOUTS = (
    Comparison("dp2 : one rank", "dp2", "one", "≥ 1.8"),
    Comparison("pp2, 8 microbatches : one rank", "pp2", "one", "≥ 1.6"),
    Comparison("tp2 : one rank", "tp2", "one", "≥ 1.4"),
    Comparison("two processes apart : one", "apart", "one", ""),
    Comparison("dp2 : two processes apart", "dp2", "apart", ""),
)


def single(series: dict[str, list[float]], stock: dict[str, list[float]]) -> str:
    """Speeds of single numbers; `stock` has fewer rounds, in a process of its own."""
    rounds = len(series["decode"])
    for name, values in stock.items():
        series[f"{name} stock"] = [statistics.median(values)] * rounds
    lines = []
    for c in SINGLE:
        ours, theirs = series[c.ours], series[c.theirs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        speeds = f"{statistics.median(ours):.1f} : {statistics.median(theirs):.1f}"
        lines.append([c.label, speeds, *_ratio(ratios), c.goal])
    return _table(["", "tok/s", "ratio", "lowest–highest", "goal"], lines)


def load(loads: dict[str, list[dict[str, int]]]) -> str:
    """What each rank of some layouts reads and holds."""
    lines = []
    for layout, ranks in loads.items():
        for rank, r in enumerate(ranks):
            shares = [f"{r['shard'] / MIB:.0f} MiB", f"{r['read'] / r['shard']:.2f}"]
            peaks = [f"{r[key] / MIB:.0f} MiB" for key in ("peak_rss", "bound")]
            lines.append([f"{layout}, {rank}", *shares, *peaks])
    head = ["layout, rank", "shard", "read : shard (≤ 1.1)", "peak RSS"]
    return _table([*head, "≤ shard + largest + base"], lines)


def batch(report: Report) -> str:
    """One rank against mlx-lm."""
    return _runs(report, BATCH)


def layouts(report: Report) -> str:
    """Two ranks against one."""
    return _runs(report, LAYOUTS)


def pipeline(report: Report) -> str:
    """pp2 against mlx-lm's pipeline."""
    return _runs(report, PIPELINE)


def shard(report: Report) -> str:
    """tp2 against mlx-lm's `shard()`."""
    return _runs(report, SHARD)


def why(report: Report) -> str:
    """What each variant took, against mlx-lm as it is."""
    lines = []
    for name, run in report.items():
        ratios = _ratios(report["mlx-lm"], run)
        times = [f"{statistics.median(run[f'{part}seconds']):.1f}" for part in _TIMES]
        counts = [f"{run['num_prefilled']}", f"{run['num_steps']}"]
        lines.append([name, *times, *counts, *_ratio(ratios), _equal(run)])
    head = ["", "seconds", "prefill", "decode", "tokens prefilled", "steps"]
    return _table([*head, "mlx-lm : this", "lowest–highest", "rows equal"], lines)


_TIMES = ("", "prefill_", "decode_")


def host(report: Report) -> str:
    """The scheduler's share of a step."""
    lines = []
    for name, run in report.items():
        step = statistics.median(run["decode_seconds"]) / run["num_steps"]
        host = statistics.median(run["host_seconds"]) / run["num_steps"]
        share = statistics.median(
            a / b for a, b in zip(run["host_seconds"], run["seconds"], strict=True)
        )
        lines.append([name, f"{1e3 * host:.2f} ms", f"{1e3 * step:.1f} ms", f"**{share:.2%}**"])
    return _table(["", "host, per step", "decode, per step", "host, of the run (≤ 3 %)"], lines)


def curve(curve: dict[str, Any]) -> str:
    """Decode over batch size with its roofs."""
    read = statistics.median(curve["read_seconds"])
    lines = []
    for i, rows in enumerate(curve["batches"]):
        engine, gemm = (statistics.median(r[i] for r in curve[s]) for s in ("engine", "gemm"))
        share = engine / min(gemm, rows / read)
        speeds = [f"{engine:.1f}", f"{gemm:.1f}", f"{rows / read:.1f}"]
        lines.append([str(rows), *speeds, f"{share:.0%}"])
    head = ["rows", "tok/s", "matrix products alone", "reading the weights alone"]
    return _table([*head, "of the lower roof"], lines)


def memory(grown: Growth) -> str:
    """Growth of the process."""
    lines = []
    series = {"resident": grown.rss, "handed out by the C library": grown.heap}
    for label, values in series.items():
        if values:
            numbers = [values[grown.num_cold], grown.slope(values), grown.span(values)]
            lines.append([label, *(f"{number:.1f} MiB" for number in numbers)])
    after = f"after {grown.num_rows[grown.num_cold]:,} rows"
    head = ["", after, f"growth per 1,000 rows, up to {grown.num_rows[-1]:,}"]
    return _table([*head, "highest − lowest"], lines)


def train(report: Report) -> str:
    """One rank against mlx-lm's trainer."""
    return _trained(report, TRAIN)


def train_layouts(report: Report) -> str:
    """Training on two ranks against one."""
    return _trained(report, TRAIN_LAYOUTS)


def train_memory(peaks: dict[str, dict[str, list[int]]]) -> str:
    """Peaks of each rank over microbatches; growth from the fewest to the most."""
    lines = []
    for name, by_count in peaks.items():
        for rank, values in enumerate(zip(*by_count.values(), strict=True)):
            cells = [f"{value / MIB:.0f} MiB" for value in values]
            goal = "≤ 1.05" if name == "1f1b" else ""
            lines.append(
                [f"{name}, rank {rank}", *cells, f"**{values[-1] / values[0]:.2f}**", goal]
            )
    counts = list(next(iter(peaks.values())))
    head = ["microbatches", *counts, f"{counts[-1]} : {counts[0]}", "goal"]
    return _table(head, lines)


def save(found: dict[str, list[float]]) -> str:
    """Bandwidth and pause of checkpoints."""
    rates = [n / s / MIB for n, s in zip(found["bytes"], found["seconds"], strict=True)]
    pauses = [p / s for p, s in zip(found["pause"], found["step"], strict=True)]
    median = {name: statistics.median(values) for name, values in found.items()}
    lines = [
        ["checkpoint", f"{median['bytes'] / MIB:.0f} MiB", "", ""],
        ["until committed, nothing else to do", f"{median['seconds']:.2f} s", "", ""],
        ["… bandwidth", f"**{statistics.median(rates):.0f} MiB/s**", _range(rates, ".0f"), ""],
        ["step without a save", f"{median['step']:.2f} s", "", ""],
        ["the call that begins a save", f"{median['call']:.3f} s", "", ""],
        ["pause of training, in steps", *_ratio(pauses), "≤ 1"],
        ["… steps until committed", f"{median['steps']:.0f}", "", ""],
    ]
    return _table(["", "", "lowest–highest", "goal"], lines)


def _trained(report: Report, comparisons: Sequence[Comparison]) -> str:
    lines = []
    for c in comparisons:
        ours, theirs = report[c.ours], report[c.theirs]
        speeds = [f"{statistics.median(side['tokens_per_sec']):.1f}" for side in (ours, theirs)]
        difference = f"{max(side['loss_difference'] for side in (ours, theirs)):.0e}"
        ratio = _ratio(_ratios(theirs, ours))
        # Processes apart go on with other parameters each.
        known = "" if "apart" in (c.ours, c.theirs) else difference
        lines.append([c.label, " : ".join(speeds), *ratio, c.goal, known])
    return _table(["", "tok/s", "ratio", "lowest–highest", "goal", "losses differ by"], lines)


def _runs(report: Report, comparisons: Sequence[Comparison]) -> str:
    lines = []
    for c in comparisons:
        ours, theirs = report[c.ours], report[c.theirs]
        seconds = [f"{statistics.median(side['seconds']):.2f}" for side in (ours, theirs)]
        ratio = _ratio(_ratios(theirs, ours))
        lines.append([c.label, " : ".join(seconds), *ratio, c.goal, _equal(ours)])
    return _table(["", "seconds", "ratio", "lowest–highest", "goal", "rows equal"], lines)


def _ratios(slow: dict[str, Any], fast: dict[str, Any]) -> list[float]:
    """By round, how many times faster, the new tokens per second being compared."""
    speeds = zip(fast["tokens_per_sec"], slow["tokens_per_sec"], strict=True)
    return [a / b for a, b in speeds]


def _ratio(ratios: Sequence[float]) -> list[str]:
    return [f"**{statistics.median(ratios):.2f}**", _range(ratios, ".2f")]


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}}–{max(values):{form}}"


def _equal(run: dict[str, Any]) -> str:
    return f"{run['num_equal']} of {run['num_rows']}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [" | ".join(line) for line in (head, *lines)]
    return "\n".join([f"| {rows[0]} |", "|---" * len(head) + "|", *(f"| {r} |" for r in rows[1:])])
