"""Runs the measurements, each in processes of its own, and gives the README's tables of them.
`jobs/bench.py` calls this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmlx.bench import picture, tables
from hpcmlx.bench.memory import Growth
from hpcmlx.files import write_atomic
from hpcmlx.launch.mpirun import find_mpirun

_MEMORY_ROWS = 10_000
# Rows of a batch on two ranks: shorter, so that a round takes a minute or two.
_SHORT = ("--words", "3", "40", "--new", "16", "32")


def measure(what: str, model: str, *options: str, ranks: int = 1, blas: str = "") -> dict[str, Any]:
    """Run `python -m hpcmlx.bench WHAT MODEL`, one BLAS thread a process.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    argv = [sys.executable, "-m", "hpcmlx.bench", what, model, *options]
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
class Plan:
    """What to measure with.

    Attributes:
        model: directory of a float32 checkpoint.
        rounds: of every measurement.
        rows: of a batch.
        picture: where the curve goes, its data beside it; None for nowhere.
        progress: told what is measured next.
    """

    model: str
    rounds: int
    rows: int
    picture: Path | None
    progress: Callable[[str], None]

    def measure(self, what: str, *options: str, rounds: int | None = None, **how: Any) -> Any:
        times = ("--rounds", str(rounds or self.rounds))
        return measure(what, self.model, *times, *options, **how)["result"]

    def measure_rows(self, what: str, *options: str, rows: int | None = None, **how: Any) -> Any:
        return self.measure(what, "--rows", str(rows or self.rows), *options, **how)

    def measure_training(self, what: str, *options: str, **how: Any) -> Any:
        """An update has an eighth of the rows of a batch."""
        return self.measure_rows(what, *options, rows=max(2, self.rows // 8), **how)


def _single(plan: Plan) -> str:
    plan.progress("one rank against mlx-lm")
    series = plan.measure("pair")
    plan.progress("mlx-lm as installed, with its reference BLAS")
    stock = plan.measure("mlx-lm", rounds=min(plan.rounds, 2), blas="none")
    plan.progress("two ranks against one")
    series |= plan.measure("scale", ranks=2)
    plan.progress("two ranks against one, on wider layers")
    series |= plan.measure("wide", ranks=2)
    return tables.single(series, stock)


def _load(plan: Plan) -> str:
    plan.progress("loading")
    return tables.load(
        {
            "dp1_pp1_tp1": plan.measure("load"),
            "dp1_pp1_tp2": plan.measure("load", "--axis", "tp", ranks=2),
            "dp1_pp2_tp1": plan.measure("load", "--axis", "pp", ranks=2),
        }
    )


def _batch(plan: Plan) -> str:
    plan.progress("a batch on one rank against mlx-lm")
    return tables.batch(plan.measure_rows("batch"))


def _why(plan: Plan) -> str:
    plan.progress("where it comes from")
    return tables.why(plan.measure_rows("why", rounds=min(plan.rounds, 3)))


def _layouts(plan: Plan) -> str:
    plan.progress("pp2 and dp2 against one rank")
    return tables.layouts(plan.measure_rows("layouts", *_SHORT, rows=2 * plan.rows, ranks=2))


def _pipeline(plan: Plan) -> str:
    plan.progress("pp2 against mlx-lm's pipeline")
    return tables.pipeline(plan.measure_rows("pipeline", *_SHORT, ranks=2))


def _shard(plan: Plan) -> str:
    plan.progress("tp2 against mlx-lm's shard()")
    return tables.shard(plan.measure("shard", ranks=2))


def _curve(plan: Plan) -> str:
    plan.progress("decode over batch size")
    curve = plan.measure("curve")
    if plan.picture is not None:
        write_atomic(plan.picture, picture.draw(curve))
        write_atomic(plan.picture.with_suffix(".json"), json.dumps(curve) + "\n")
    return tables.curve(curve)


def _host(plan: Plan) -> str:
    plan.progress("the scheduler's own time")
    return tables.host(plan.measure_rows("host", rounds=min(plan.rounds, 2)))


def _memory(plan: Plan) -> str:
    plan.progress("memory over thousands of rows")
    return tables.memory(Growth(**plan.measure_rows("memory", rows=_MEMORY_ROWS)))


def _train(plan: Plan) -> str:
    plan.progress("LoRA on one rank against mlx-lm's trainer")
    return tables.train(plan.measure_training("train"))


def _train_layouts(plan: Plan) -> str:
    plan.progress("LoRA on two ranks against one")
    return tables.train_layouts(plan.measure_training("train_layouts", ranks=2))


def _train_memory(plan: Plan) -> str:
    plan.progress("memory of a pipeline over microbatches")
    words = ("--words", "60", "60")
    return tables.train_memory(plan.measure("train_memory", *words, ranks=2))


def _save(plan: Plan) -> str:
    plan.progress("checkpoints")
    return tables.save(plan.measure_training("save"))


#: What `jobs/bench.py --only` can name, in the order of the README.
PARTS: dict[str, Callable[[Plan], str]] = {
    "single": _single,
    "load": _load,
    "batch": _batch,
    "why": _why,
    "layouts": _layouts,
    "pipeline": _pipeline,
    "shard": _shard,
    "curve": _curve,
    "host": _host,
    "memory": _memory,
    "train": _train,
    "train_layouts": _train_layouts,
    "train_memory": _train_memory,
    "save": _save,
}
