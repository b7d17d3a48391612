"""What fine-tuning costs beside its arithmetic: memory over microbatches, and saving.
`hpcmlx.bench` runs these.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from hpcmlx import comm
from hpcmlx.bench.tuners import Bench, Chats, Tuner, load
from hpcmlx.comm import Communicator
from hpcmlx.mesh import ParallelDims
from hpcmlx.training.checkpoints.store import CheckpointStore
from hpcmlx.training.methods import Method

MICROBATCHES = (2, 4, 8, 16)
_SCHEDULES = ("1f1b", "gpipe")
_PLAIN_STEPS = 5


def train_memory(
    model: str, chats: Chats, counts: tuple[int, ...] = MICROBATCHES
) -> dict[str, dict[str, list[int]]]:
    """Peak memory of each of two stages over the number of microbatches of an update.

    Microbatches are of one row, all the same; only the size of the global batch changes.

    Args:
        chats: their `num_steps` and `batch_size` do not count.

    Returns:
        By schedule and number of microbatches, of each rank the bytes that MLX held at most during
        an update, beyond what it holds between updates.
    """
    world = comm.init()
    found: dict[str, dict[str, list[int]]] = {name: {} for name in _SCHEDULES}
    layout = load(model, world, ParallelDims(pp=world.size))
    for count in counts:
        rows = replace(chats, num_steps=1, batch_size=count, alike=True)
        with Bench(model, rows, world) as bench:
            dataset = bench.dataset()
            batches = bench.batches(dataset, 1)
            for name in _SCHEDULES:
                tuner = bench.tuner(layout, batches, dataset, name)
                tuner.step()
                found[name][str(count)] = world.allgather(_peak_of_a_step(tuner))
    return found


def _peak_of_a_step(tuner: Tuner) -> int:
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    tuner.step()
    return mx.get_peak_memory() - held


def save(
    model: str, rounds: int, chats: Chats, num_layers: int | None = None
) -> dict[str, list[float]]:
    """Checkpoints of a full fine-tuning with Adam on one rank, where there is most to save.

    Args:
        chats: one batch, their `num_steps` does not count: all steps are to take as long.
        num_layers: train the last so many; None: the whole model.

    Returns:
        By round: `bytes` of a checkpoint; `seconds` until it is committed where nothing else
        happens; `step`, the median of steps without a save; `call`, the seconds that the call
        takes; `pause`, by how much all `steps` from the call until it is committed take longer.
    """
    found: dict[str, list[float]] = {
        name: [] for name in ("bytes", "seconds", "step", "call", "pause", "steps")
    }
    with (
        Bench(model, replace(chats, num_steps=1), Communicator()) as bench,
        tempfile.TemporaryDirectory(prefix="hpcmlx-bench-") as folder,
    ):
        dataset = bench.dataset()
        method = Method("full", num_layers=num_layers)
        layout = load(model, Communicator(), ParallelDims(), method=method)
        tuner = bench.tuner(layout, bench.batches(dataset, chats.batch_size), dataset)
        directory = Path(folder, "checkpoints")
        store = CheckpointStore(directory, Communicator(), keep_last=2, keep_best=0)
        tuner.step()  # what is slow only once
        for _ in range(rounds):
            plain = [_seconds(tuner) for _ in range(_PLAIN_STEPS)]
            for name, value in _while_training(tuner, store, statistics.median(plain)).items():
                found[name].append(value)
            tuner.step()
            for name, value in _while_waiting(tuner, store).items():
                found[name].append(value)
    return found


def _seconds(tuner: Tuner) -> float:
    """Of a step."""
    begin = time.perf_counter()
    tuner.step()
    return time.perf_counter() - begin


def _begin(tuner: Tuner, store: CheckpointStore) -> int:
    """Begin a save as the job does; what is to be written, in bytes."""
    tuner.trainer.check_replicas()
    pieces = tuner.trainer.pieces()
    store.save(tuner.steps_done, pieces, {"step": tuner.steps_done})
    return sum(piece.array.nbytes for piece in pieces.values())


def _while_training(tuner: Tuner, store: CheckpointStore, step: float) -> dict[str, float]:
    begin = time.perf_counter()
    _begin(tuner, store)
    call = time.perf_counter() - begin
    steps = 0
    while True:
        tuner.step()
        steps += 1
        if store.poll() is not None:
            break
    pause = time.perf_counter() - begin - steps * step
    return {"step": step, "call": call, "pause": pause, "steps": float(steps)}


def _while_waiting(tuner: Tuner, store: CheckpointStore) -> dict[str, float]:
    begin = time.perf_counter()
    size = _begin(tuner, store)
    store.poll(wait=True)
    return {"bytes": float(size), "seconds": time.perf_counter() - begin}
