"""Runs of jobs/finetune.py that tests start, stop and look into."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from hpcmlx.comm import Communicator
from hpcmlx.observe.metrics import read_metrics
from hpcmlx.training.checkpoints.store import CheckpointStore
from hpcmlx.training.finetune import CHECKPOINTS

#: Columns of the metrics that do not depend on how fast a host is.
SERIES = ("step", "loss", "grad_norm", "learning_rate", "skipped")


@dataclass(frozen=True)
class State:
    """The newest checkpoint of a run.

    Attributes:
        step: updates that are in it.
        digest: SHA-256 of all parameters and of the optimizer's state, whatever layout saved them.
        progress: what the run says of itself.
    """

    step: int
    digest: str
    progress: Mapping[str, Any]


def state(run_dir: Path, step: int | None = None) -> State | None:
    """Of a run that is not under way: its newest checkpoint (or that of `step`), which is whole, or
    None. Fails where one is damaged."""
    found = CheckpointStore(run_dir / CHECKPOINTS, Communicator()).find(step)
    if found is None:
        return None
    with found:
        digest = hashlib.sha256()
        for name, (shape, dtype) in sorted(found.tensors.items()):
            array = found.read(name).view(mx.uint8)
            digest.update(f"{name} {shape} {dtype}".encode() + np.array(array).tobytes())
        return State(found.step, digest.hexdigest(), found.state["progress"])


def series(run_dir: Path) -> dict[str, np.ndarray]:
    """Column -> [steps], of `SERIES`; nothing before the first step."""
    rows = read_metrics(run_dir).get("train", {})
    return {name: rows[name] for name in SERIES if name in rows}


def num_rows(run_dir: Path) -> int:
    """Steps that have been logged."""
    return len(series(run_dir).get("step", ()))


def committed(run_dir: Path) -> list[int]:
    """Steps of the checkpoints as they lie there, oldest first; touches nothing."""
    return sorted(int(path.name[5:]) for path in (run_dir / CHECKPOINTS).glob("step-????????"))


def files(run_dir: Path) -> dict[Path, tuple[int, bytes]]:
    """What a launch that does nothing leaves alone: (time of the last change, content)."""
    own = {"lock", "completed.json", "run.json", "report.html"}
    paths = [path for path in run_dir.rglob("*") if path.is_file() and path.name not in own]
    kept = [path for path in paths if path.parent.name not in ("logs", "flight")]
    return {
        path.relative_to(run_dir): (path.stat().st_mtime_ns, path.read_bytes()) for path in kept
    }
