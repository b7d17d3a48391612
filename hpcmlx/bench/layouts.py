"""Batches on two ranks: pp2 and dp2 against one rank, pp2 and tp2 against mlx-lm's own.

What is compared runs in turn on the same two processes; for one rank alone the other sleeps.
`hpcmlx.bench` runs these under mpirun.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model as mlx_lm_load

from hpcmlx import comm
from hpcmlx.bench.measure import LONG, NUM_NEW, SHORT, on_rank_0, prompt
from hpcmlx.bench.random_models import random_checkpoint
from hpcmlx.bench.rows import (
    NoText,
    Run,
    Variant,
    Workload,
    report,
    run_hpcmlx,
    run_mlx_lm,
    runs_in_turn,
)
from hpcmlx.comm import Communicator
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import LoadedModel, load_model
from hpcmlx.models.tokenizer import load_tokenizer

_ROWS_PER_PLACE = 5


class Layout:
    """A model on a layout of the world; without `dims` on rank 0 alone."""

    def __init__(self, model: str, world: Communicator, **dims: int):
        self.world, self.alone = world, not dims and world.size > 1
        mesh = Mesh(ParallelDims(**dims), Communicator() if self.alone else world)
        self.mesh = mesh
        self.loaded: LoadedModel | None = None
        if not self.alone or world.rank == 0:
            self.loaded = load_model(open_checkpoint(model), mesh)

    def run(self, tokenizer: Any, requests: list[Request], **options: Any) -> Run | None:
        """Generate; None on a rank that has no part in it."""
        generate = partial(run_hpcmlx, self.loaded, self.mesh, tokenizer, requests, **options)
        return on_rank_0(self.world, generate) if self.alone else generate()


def layouts(model: str, rounds: int, workload: Workload) -> dict[str, Any]:
    """pp2 and dp2 against one rank, with as many rows in flight on one rank as on both, and half.

    There are several rows for every place, as in a long job: the end, where places stay empty,
    takes two ranks as long as one. With pp2 there are two slots, with dp2 two replicas.
    `apart` is what this host allows at most: each process generates half of the rows and knows
    nothing of the other. Where the two cores share caches, memory or execution units that is less
    than twice the speed of one.
    """
    world, tokenizer = comm.init(), load_tokenizer(model)
    one, pp2 = Layout(model, world), Layout(model, world, pp=2)
    dp2, alone = Layout(model, world, dp=2), Layout(model, Communicator())
    requests = workload.requests(tokenizer)
    half = max(1, len(requests) // _ROWS_PER_PLACE)

    def variant(layout: Layout, **options: Any) -> Variant:
        layout.run(tokenizer, requests[:4], **options)  # what is slow only once
        return Variant(partial(layout.run, tokenizer, requests, **options))

    def apart() -> Run | None:
        world.barrier()
        mine = alone.run(tokenizer, requests[world.rank :: 2], batch_size=half)
        parts = world.allgather(mine)
        slowest = max(parts, key=lambda run: run.seconds)
        return replace(slowest, tokens=dict(sorted((parts[0].tokens | parts[1].tokens).items())))

    variants = {
        "one, twice the places": variant(one, batch_size=2 * half),
        "one": variant(one, batch_size=half),
        "pp2": variant(pp2, batch_size=half),
        "dp2": variant(dp2, batch_size=half),
        "apart": Variant(apart),
    }
    return report(runs_in_turn(rounds, variants), "one")


def qwen2_pipeline(
    model: str, rounds: int, workload: Workload, name: str = "qwen2"
) -> dict[str, Any]:
    """pp2 against mlx-lm's own pipeline of two ranks under its `BatchGenerator`.

    Args:
        model: where the tokenizer comes from; the random model knows all its tokens.
        name: of the random model.
    """
    world = comm.init()
    with random_checkpoint(name, world) as folder:
        ours = Layout(folder, world, pp=2)
        theirs = mlx_lm_load(Path(folder), lazy=True)[0]
        # It asks its group for rank and size only; messages go through MLX's default group.
        theirs.model.pipeline(SimpleNamespace(rank=lambda: world.rank, size=lambda: world.size))
        mx.eval(theirs.parameters())
    requests = workload.requests(load_tokenizer(model))
    half = max(1, len(requests) // 2)
    variants = {
        "hpcmlx pp2": Variant(partial(ours.run, NoText(), requests, batch_size=half)),
        "mlx-lm pipeline": _theirs(theirs, world, requests, batch_size=2 * half),
        "mlx-lm pipeline, half": _theirs(theirs, world, requests, batch_size=half),
    }
    for variant in variants.values():
        variant.run()
    return report(runs_in_turn(rounds, variants), "mlx-lm pipeline")


def llama_shard(name: str, rounds: int) -> dict[str, Any]:
    """tp2 against mlx-lm's `shard()` on two ranks: decode of one row and of eight, and prefill.

    A decode is a run of rows with short prompts, a prefill one of a row with one new token.

    Args:
        name: of the random model.
    """
    world = comm.init()
    with random_checkpoint(name, world) as folder:
        ours = Layout(folder, world, tp=2)
        theirs = mlx_lm_load(Path(folder), lazy=True)[0]
        theirs.shard()
        mx.eval(theirs.parameters())
    found: dict[str, Any] = {}
    for label, num_rows, length, num_new in (
        ("decode 1 row", 1, SHORT, NUM_NEW),
        ("decode 8 rows", 8, SHORT, NUM_NEW),
        ("prefill", 1, LONG, 1),
    ):
        sampling = SamplingParams(max_tokens=num_new)
        prompts = [prompt(length, ours.loaded.vocab_size, row) for row in range(num_rows)]
        requests = [Request(i, str(i), tokens, sampling) for i, tokens in enumerate(prompts)]
        variants = {
            f"hpcmlx tp2, {label}": Variant(
                partial(ours.run, NoText(), requests, batch_size=num_rows, prefill_chunk=2048)
            ),
            f"mlx-lm shard, {label}": _theirs(theirs, world, requests, batch_size=num_rows),
        }
        for variant in variants.values():
            variant.run()
        found |= report(runs_in_turn(rounds, variants), f"mlx-lm shard, {label}")
    return found


def _theirs(model: Any, world: Communicator, requests: list[Request], **options: Any) -> Variant:
    """mlx-lm on all ranks: each runs the same generator over the same rows."""

    def run() -> Run:
        world.barrier()
        done = run_mlx_lm(model, NoText(), requests, **options)
        world.barrier()
        return done

    return Variant(run)
