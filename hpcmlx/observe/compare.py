"""Runs beside each other: what their settings differ in, and what became of each.

`jobs/compare.py` prints the table; `compare_plot.py` draws it. A run counts by its completion
record: one without is shown as that, and its numbers are left out.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

from hpcmlx.config import SAVED
from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.observe.metrics import METRICS, read_metrics
from hpcmlx.record import completion
from hpcmlx.sweep.points import SWEEP, load_sweep, state

# What a run is judged by, of the numbers that there are; all of them with --csv and --json.
_SHOWN = ["best_loss", "train_loss", "perplexity", "accuracy", "this_launch.tokens_per_sec"]
_SHOWN += ["ttft_seconds.p50", "tpot_seconds.p50", "tokens", "seconds"]
# They say where a run is or how it was started, not what it does.
_NOT_COMPARED = ("run_dir", "resume", "launch", "sweep")

Curves = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        name: of the directory, or of the point of a sweep.
        state: as in "complete" or "FAILED".
        settings: dotted key -> value.
        numbers: of its summary.json, by dotted key, and `train_loss`, the last one; empty where the
            run is not complete.
        curves: as `read_metrics` gives them.
    """

    name: str
    path: Path
    state: str
    settings: Mapping[str, Any]
    numbers: Mapping[str, float] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.state.startswith("complete")


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories, each a run's or a sweep's.

    Raises:
        ConfigError: one is neither.
        IntegrityError, StorageError: a file is damaged or cannot be read.
    """
    found = []
    for path in paths:
        if (path / SWEEP).exists():
            sweep = load_sweep(path)
            for point in sweep.points:
                config = sweep.file(point, "yaml")
                found.append(_read(sweep.run_dir(point), state(sweep, point), config))
        elif (path / SAVED).exists():
            found.append(_read(path, "complete" if completion(path) else "not complete"))
        else:
            raise ConfigError(f"{path} is neither a run nor a sweep: no {SAVED}, no {SWEEP}")
    if not found:
        raise ConfigError("no run to compare: the sweep has not begun any")
    return found


def _read(path: Path, how: str, planned: Path | None = None) -> Run:
    """
    Args:
        planned: the configuration of a run that may not have begun.
    """
    config = path / SAVED
    if planned is not None and not config.exists():
        config = planned
    settings = _settings(config) if config.exists() else {}
    curves = read_curves(path)
    if not completion(path):
        return Run(path.name, path, how, settings, {}, curves)
    numbers = _numbers(path / "summary.json")
    losses = curves.get("train", {}).get("loss", np.empty(0))
    if np.isfinite(losses).any():
        numbers["train_loss"] = float(losses[np.isfinite(losses)][-1])
    return Run(path.name, path, how, settings, numbers, curves)


def read_curves(path: Path) -> Curves:
    """The rows that a run has logged, from its HDF5 file; from the live record where it has not
    come to build one.

    Raises:
        IntegrityError: the file is damaged.
    """
    file = path / METRICS
    if not file.exists():
        return read_metrics(path)
    try:
        with h5py.File(file, "r") as data:
            return {kind: {k: v[()] for k, v in group.items()} for kind, group in data.items()}
    except (OSError, AttributeError, TypeError) as error:
        raise IntegrityError(f"{file} is damaged: {' '.join(str(error).split())}") from error


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs, in the order of the configuration."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    begun = [run for run in runs if run.settings]
    texts = {key: {json.dumps(run.settings.get(key)) for run in begun} for key in keys}
    return [
        key for key in keys if len(texts[key]) > 1 and key.partition(".")[0] not in _NOT_COMPARED
    ]


def shown_metrics(runs: Sequence[Run], wanted: Sequence[str] = ()) -> list[str]:
    """Which numbers have a column.

    Raises:
        ConfigError: no run has the wanted one.
    """
    there = {key for run in runs for key in run.numbers}
    for name in wanted:
        if name not in there:
            raise ConfigError(f"no run has a number {name}; there are: {', '.join(sorted(there))}")
    return list(wanted) or [name for name in _SHOWN if name in there]


def table(
    runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows, as text."""
    header = ["run", *keys, "state", *metrics]
    rows = []
    for run in runs:
        settings = [_text(run.settings.get(key)) for key in keys]
        numbers = [f"{run.numbers[m]:.5g}" if m in run.numbers else "" for m in metrics]
        rows.append([run.name, *settings, run.state, *numbers])
    return header, rows


def as_csv(runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> str:
    """The same in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *keys, "state", *metrics])
    for run in runs:
        settings = [_text(run.settings.get(key)) for key in keys]
        numbers = [repr(run.numbers[m]) if m in run.numbers else "" for m in metrics]
        writer.writerow([run.name, *settings, run.state, *numbers])
    return out.getvalue()


def as_json(runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> str:
    """A list with an object for each run."""
    rows = [
        {
            "run": str(run.path),
            "state": run.state,
            "settings": {key: run.settings.get(key) for key in keys},
            "metrics": {name: run.numbers.get(name) for name in metrics},
        }
        for run in runs
    ]
    return json.dumps(rows, indent=2) + "\n"


def _settings(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(f"{path} cannot be read: {reason}") from error
    return dict(_leaves(values, ""))


def _numbers(path: Path) -> dict[str, float]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    numbers = {k: v for k, v in _leaves(values, "") if isinstance(v, int | float)}
    return {k: float(v) for k, v in numbers.items() if math.isfinite(v)}


def _leaves(node: Any, key: str) -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(key, node)]
    return [x for name, v in node.items() for x in _leaves(v, f"{key}.{name}" if key else name)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
