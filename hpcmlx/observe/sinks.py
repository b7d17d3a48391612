"""Where else a run's numbers go: TensorBoard, Weights & Biases, MLflow.

All are optional: their packages are imported when a run asks for them. The run's own record is
`metrics.csv` (`metrics.py`), which needs none. Nothing uses the network unless the environment says
so (`WANDB_MODE`, `MLFLOW_TRACKING_URI`). Each launch of a resumed run is a run of its own in
W&B and MLflow, so that no step is there twice in one; TensorBoard drops what is done again.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hpcmlx.errors import ConfigError
from hpcmlx.extras import require

_PROJECT = "hpcmlx"
_BATCH = 500  # numbers in one request; MLflow allows 1000
_BATCH_SECONDS = 5.0


class Sink(Protocol):
    """Takes rows of numbers while a run goes on."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take one row.

        Args:
            kind: "train" or "eval".
            step: ascending within a kind.
            values: name -> number; not all rows have the same names.
        """

    def close(self) -> None:
        """Hand over what is still in a buffer."""


def require_sinks(names: Sequence[str]) -> None:
    """Call it before a run that shall use them.

    Raises:
        ConfigError: there is no such sink, or its package is not installed here.
    """
    for name in names:
        if name not in _SINKS:
            raise ConfigError(f"there is no sink {name!r}: choose from {', '.join(_SINKS)}")
        package, _ = _SINKS[name]
        require(package, name, f"train.sinks={name}", "leave it out")


def open_sinks(names: Sequence[str], run_dir: Path, first_step: int = 0) -> list[Sink]:
    """Connect to sinks; on world rank 0 only.

    Args:
        names: keys of "tensorboard", "wandb", "mlflow".
        run_dir: gives the run its name; local files go there.
        first_step: the first step of this launch; above 0 where it resumes a run.

    Raises:
        ConfigError: as `require_sinks`, or a sink refuses (no server, no permission).
    """
    require_sinks(names)
    sinks = []
    for name in names:
        _, build = _SINKS[name]
        try:
            sinks.append(build(run_dir.resolve(), first_step))
        except Exception as error:  # whatever that package raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"cannot open {name}: {reason}; mend it or leave it out") from error
    return sinks


class TensorBoard:
    """Event files in `tensorboard/` of the run directory: `tensorboard --logdir runs`."""

    def __init__(self, run_dir: Path, first_step: int):
        package: Any = importlib.import_module("tensorboardX")
        self._writer = package.SummaryWriter(
            logdir=str(run_dir / "tensorboard"),
            purge_step=first_step or None,
            flush_secs=10,
            # It names files by the second and overwrites what is there.
            filename_suffix=f".{time.time_ns()}",
        )

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases: offline, into `wandb/` of the run directory, for `wandb sync`; with
    `WANDB_MODE=online` straight to the server."""

    def __init__(self, run_dir: Path, first_step: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        package: Any = importlib.import_module("wandb")
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            group=run_dir.name,
            name=_launch_name(run_dir, first_step),
            dir=str(run_dir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings={"console": "off"},  # the run has logs of its own
        )
        # Its own step must ascend over all rows, and an evaluation may come after later steps.
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({"step": step, **named})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow: a SQLite file `mlflow.db` in the run directory, or the server that
    `MLFLOW_TRACKING_URI` names. (MLflow 3 refuses to write into plain directories.)

    Rows travel in batches: one takes a SQLite file as long as a row does, some 50 ms.
    """

    def __init__(self, run_dir: Path, first_step: int, clock: Callable[[], float] = time.monotonic):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        package: Any = importlib.import_module("mlflow")
        self._clock, self._sent = clock, clock()
        self._waiting: list[Any] = []
        self._metric = importlib.import_module("mlflow.entities").Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir / 'mlflow.db'}")
        self._client = package.MlflowClient(tracking_uri=uri)
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(experiment_name)
        if experiment is None:
            experiment_id = self._client.create_experiment(experiment_name)
        else:
            experiment_id = experiment.experiment_id
        run = self._client.create_run(
            experiment_id,
            tags={"hpcmlx.run_dir": str(run_dir), "hpcmlx.first_step": str(first_step)},
            run_name=_launch_name(run_dir, first_step),
        )
        self._run_id = run.info.run_id

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        self._waiting += [
            self._metric(f"{kind}/{name}", float(value), now, step)
            for name, value in values.items()
        ]
        if len(self._waiting) >= _BATCH or self._clock() - self._sent >= _BATCH_SECONDS:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._run_id)

    def _send(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            self._client.log_batch(self._run_id, metrics=batch)
        self._sent = self._clock()


def _launch_name(run_dir: Path, first_step: int) -> str:
    return f"{run_dir.name} from step {first_step}" if first_step else run_dir.name


#: Name -> (its package, what opens it); the name is also that of the extra that installs it.
_SINKS: dict[str, tuple[str, Callable[[Path, int], Any]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
    "mlflow": ("mlflow", MLflow),
}
