"""What a run needs to know of earlier launches of itself, and of the room that it will need.

`finetune.py` looks before the model is loaded: a run that is done, that was begun differently or
that cannot be saved is told so at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from hpcmlx.errors import ConfigError
from hpcmlx.files import write_atomic
from hpcmlx.inference.manifest import fingerprint
from hpcmlx.models.checkpoint import Checkpoint
from hpcmlx.models.gguf import GGUFCheckpoint
from hpcmlx.models.loader import resolve_formats
from hpcmlx.redact import compared, written
from hpcmlx.rundir import check_room
from hpcmlx.settings_finetune import FinetuneConfig, TrainConfig
from hpcmlx.training.optim import Optimizer

#: Bytes that a tensor takes beside its numbers, measured: in the manifest, and HDF5's own.
_AROUND = 1280


@dataclass
class Progress:
    """Where a run is, beside its parameters; the same on every rank and in every checkpoint.

    Attributes:
        step: the next one.
        best: lowest evaluation loss so far.
        without_better: evaluations since then.
        bad_in_row, num_skipped: steps whose gradients were not finite: now in a row, and in all.
        num_tokens: trained on.
    """

    step: int = 0
    best: float | None = None
    without_better: int = 0
    bad_in_row: int = 0
    num_skipped: int = 0
    num_tokens: int = 0

    def sees_no_gain(self, patience: int | None) -> bool:
        """Whether so many evaluations have been without a better loss."""
        return patience is not None and self.without_better >= patience


def identity(
    cfg: FinetuneConfig,
    checkpoint: Checkpoint | GGUFCheckpoint,
    data_hash: str,
    num_steps: int,
) -> dict[str, Any]:
    """What must be the same when a run goes on, and what an export has to know. Texts that came
    from the environment are not in it.

    Args:
        data_hash: of the examples.
        num_steps: of the whole run.
    """
    train, shown = cfg.train, cfg.unresolved
    path = written("model.path", str(checkpoint.path.absolute()), shown)
    modules = compared("method.modules", cfg.method.modules, shown)
    no_decay = compared("optim.no_decay", cfg.optim.no_decay, shown)
    dtype, weights = resolve_formats(cfg.model.dtype, cfg.model.weights)
    return {
        "model": {"path": path, "files": fingerprint(checkpoint)},
        "dtype": dtype,
        "weights": weights,
        "method": asdict(cfg.method) | {"modules": modules},
        # zero1: where the state lies, not what it is
        "optim": asdict(cfg.optim) | {"no_decay": no_decay, "zero1": None},
        "data": {
            "train": data_hash,
            "packing": cfg.data.packing,
            "max_length": cfg.data.max_length,
        },
        "train": {"batch_size": train.batch_size, "seed": train.seed},
        "num_steps": num_steps,
    }


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    """
    Raises:
        ConfigError: a checkpoint was written by another run than this one; says each difference.
    """
    differences = [
        f"{key} was {json.dumps(was)}, is {json.dumps(value)}"
        for key, was, value in _compared(before, now, "")
        if key != "model.path"
    ]
    if differences:
        raise ConfigError(
            f"run directory {run_dir} was begun differently: {'; '.join(differences[:5])} (set it "
            "back, or give another run_dir)"
        )


def _compared(before: Any, now: Any, key: str) -> Sequence[tuple[str, Any, Any]]:
    """(dotted key, before, now) where they differ, of all that `now` has."""
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        found: list[tuple[str, Any, Any]] = []
        for name, value in now.items():
            found += _compared(before.get(name), value, f"{key}.{name}" if key else name)
        return found
    same = json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True)
    return [] if same else [(key, before, now)]


def check_checkpoint_room(
    directory: Path,
    cfg: TrainConfig,
    num_steps: int,
    trained: Mapping[str, mx.array],
    optimizer: Optimizer,
) -> None:
    """Refuse a run whose checkpoints do not fit on this host, where all of them may come to lie.

    Args:
        directory: of the checkpoints; those that are there make room for new ones.
        num_steps: that are left.
        trained: whole stand-ins, unevaluated.
        optimizer: a new one, for the size of its state.

    Raises:
        OutputError: there is too little room.
    """
    optimizer.init(trained)
    arrays = [*trained.values(), *optimizer.state.values()]
    one = sum(array.nbytes + _AROUND for array in arrays)
    # The newest is written before the oldest is deleted.
    most = cfg.keep_last + cfg.keep_best + 1
    number = min(most, -(-num_steps // cfg.save_every) if cfg.save_every else 1)
    there = sum(file.stat().st_size for file in directory.glob("*/*"))
    needed = max(one, number * one - there)
    what = "a checkpoint" if needed == one else "the checkpoints that are kept"
    check_room(directory, needed, what)


def drop_later_lines(path: Path, first_step: int) -> None:
    """Drop lines of a JSONL file whose `step` will be done again, and a torn last one."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    *lines, torn = text.split("\n")
    kept = [line for line in lines if json.loads(line)["step"] < first_step]
    if torn or len(kept) < len(lines):
        write_atomic(path, "".join(f"{line}\n" for line in kept))
