"""Single numbers of a model: decode and prefill speed, on one rank and on two, and loading.

What is compared runs in turn in the same processes, so that a machine whose speed drifts slows both
sides alike. Random prompts, no end token, greedy, float32. `hpcmlx.bench` runs these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model as mlx_lm_load

from hpcmlx import comm
from hpcmlx.bench.random_models import random_checkpoint
from hpcmlx.bench.rows import NoText
from hpcmlx.comm import Communicator
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.rows import Request, RowResult
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import LoadedModel, load_model
from hpcmlx.observe.summary import peak_rss

SHORT, LONG, NUM_NEW = 16, 256, 25  # tokens of a short and a long prompt, and new ones
Series = dict[str, list[float]]
T = TypeVar("T")


def prompt(length: int, vocab_size: int, row: int = 0) -> tuple[int, ...]:
    """A prompt of `length` token ids, the same on every run."""
    return tuple(((row * 7919 + i * 104729) % 40000 + 100) % vocab_size for i in range(length))


class Runner:
    """One layout of the model under test."""

    def __init__(self, model: str, mesh: Mesh):
        self.mesh = mesh
        self.loaded: LoadedModel = load_model(open_checkpoint(model), mesh)

    def _run(self, num_rows: int, length: int, num_new: int, batch: int) -> list[RowResult]:
        engine = Engine(self.loaded, self.mesh, NoText(), batch_size=batch, prefill_chunk=2048)
        sampling = SamplingParams(max_tokens=num_new)
        rows: list[RowResult] = []
        prompts = [prompt(length, self.loaded.vocab_size, row) for row in range(num_rows)]
        requests = [Request(i, str(i), tokens, sampling) for i, tokens in enumerate(prompts)]
        engine.run(requests, rows.append)
        return rows

    def decode(self, batch: int) -> float:
        """Tokens per second over all rows, from the first row's first token to the last row's last:
        `batch` rows in every microbatch, a microbatch for every stage."""
        # A longer run with several slots: the first tokens come while later slots still fill.
        num_new = NUM_NEW if batch == 1 else 2 * NUM_NEW
        rows = self._run(batch * self.mesh.dims.pp, SHORT, num_new, batch)
        begin = min(row.created - row.seconds + row.ttft for row in rows)
        return len(rows) * (num_new - 1) / (max(row.created for row in rows) - begin)

    def prefill(self) -> float:
        """Prompt tokens per second, up to the first new token."""
        return LONG / self._run(1, LONG, 1, 1)[0].ttft


class MlxLm:
    """mlx-lm's own `generate_step` on a model."""

    def __init__(self, model: Any):
        self.model = model

    def _times(self, length: int, num_new: int) -> list[float]:
        vocab_size = self.model.args.vocab_size
        begin = time.perf_counter()
        steps = generate_step(mx.array(prompt(length, vocab_size)), self.model, max_tokens=num_new)
        return [time.perf_counter() - begin for _ in steps]

    def decode(self) -> float:
        """Tokens per second of one row, prefill excluded."""
        at = self._times(SHORT, NUM_NEW)
        return (NUM_NEW - 1) / (at[-1] - at[0])

    def prefill(self) -> float:
        """Prompt tokens per second, up to the first new token."""
        return LONG / self._times(LONG, 1)[0]


def in_turn(rounds: int, measurements: dict[str, Callable[[], float | None]]) -> Series:
    """Every measurement once per round, after one that does not count."""
    series: Series = {name: [] for name in measurements}
    for number in range(rounds + 1):
        for name, measure in measurements.items():
            value = measure()
            if number:
                series[name].append(value)
    return series


def pair(model: str, rounds: int) -> Series:
    """One rank of hpcmlx and mlx-lm, in one process and on the same weights in memory."""
    ours = Runner(model, Mesh(ParallelDims(), Communicator()))
    theirs = MlxLm(ours.loaded.stage.model)
    return in_turn(
        rounds,
        {
            "decode": lambda: ours.decode(1),
            "decode mlx-lm": theirs.decode,
            "prefill": ours.prefill,
            "prefill mlx-lm": theirs.prefill,
        },
    )


def mlx_lm_alone(model: str, rounds: int) -> Series:
    """mlx-lm as its user runs it."""
    theirs = MlxLm(mlx_lm_load(Path(model))[0])
    return in_turn(rounds, {"decode": theirs.decode, "prefill": theirs.prefill})


def scale(model: str, rounds: int) -> Series:
    """On two ranks: rank 0 alone (the other sleeps), tp2 and pp2."""
    world = comm.init()
    tp2 = Runner(model, Mesh(ParallelDims(tp=2), world))
    pp2 = Runner(model, Mesh(ParallelDims(pp=2), world))
    one = Runner(model, Mesh(ParallelDims(), Communicator())) if world.rank == 0 else None
    alone = partial(on_rank_0, world)
    return in_turn(
        rounds,
        {
            "one": lambda: alone(lambda: one.decode(1)),
            "tp2": lambda: tp2.decode(1),
            "one 8": lambda: alone(lambda: one.decode(8)),
            "tp2 8": lambda: tp2.decode(8),
            "pp2 8": lambda: pp2.decode(8),
            "one prefill": lambda: alone(lambda: one.prefill()),
            "tp2 prefill": tp2.prefill,
        },
    )


def wide(_: str, rounds: int) -> Series:
    """One rank and tp2 on a random model with layers as wide as those of a 1B one: what remains of
    tp2 when the work that cannot be split is small beside the rest."""
    world = comm.init()
    with random_checkpoint("wide", world) as folder:
        tp2 = Runner(folder, Mesh(ParallelDims(tp=2), world))
        one = Runner(folder, Mesh(ParallelDims(), Communicator())) if world.rank == 0 else None
    alone = partial(on_rank_0, world)
    return in_turn(
        rounds,
        {"one wide": lambda: alone(lambda: one.decode(1)), "tp2 wide": lambda: tp2.decode(1)},
    )


def on_rank_0(world: Communicator, measure: Callable[[], T]) -> T | None:
    """Measure on rank 0 while rank 1 sleeps, which leaves rank 0 what it would have alone."""
    if world.rank == 0:
        value = measure()
        world.isend(mx.array([1], mx.int32), 1, 1).wait()
        return value
    done = world.irecv((1,), mx.int32, 0, 1)
    while not done.done():
        time.sleep(0.01)
    return None


def load(model: str, axis: str | None) -> list[dict[str, int]] | None:
    """What loading reads and holds on each rank, in bytes.

    Args:
        axis: "tp" or "pp": the model is cut along it over all ranks.
    """
    world = comm.init()
    mesh = Mesh(ParallelDims(**{axis: world.size} if axis else {}), world)
    base = peak_rss()
    checkpoint = open_checkpoint(model)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    loaded = load_model(checkpoint, mesh)
    mine = {
        "shard": loaded.num_bytes,
        "read": loaded.bytes_read,
        "peak_rss": peak_rss(),
        "bound": loaded.num_bytes + largest + base,
    }
    return mesh.world.gather(mine)
