"""Fine-tuning: one rank against mlx-lm's own trainer, and two ranks against one.

What is compared makes the same updates from the same first values on the same examples, in turn in
the same processes. LoRA of rank 8 on every projection, float32. `hpcmlx.bench` runs these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from hpcmlx import comm
from hpcmlx.bench.mlx_lm_training import MlxLmTuner, checkpointed
from hpcmlx.bench.tuners import LORA, OPTIM, Again, Bench, Chats, Run, load
from hpcmlx.comm import Communicator
from hpcmlx.mesh import ParallelDims
from hpcmlx.training.data.dataset import Dataset

_LAYOUTS = {
    "one": None,
    "dp2": ParallelDims(dp=2),
    "pp2": ParallelDims(pp=2),
    "tp2": ParallelDims(tp=2),
}


def train(model: str, rounds: int, chats: Chats) -> dict[str, Any]:
    """One rank against mlx-lm's trainer: as it is, with activations computed again, and where
    every token is a target. Both pad the same batches to the same length."""
    with Bench(model, chats, Communicator()) as bench:
        answers, everything = bench.dataset(), bench.dataset("all")
        variants: dict[str, Variant] = {}
        for suffix, dataset, recompute in (
            ("", answers, False),
            (", recompute", answers, True),
            (", all targets", everything, False),
        ):
            layout = load(model, bench.world, ParallelDims(), recompute=recompute)
            batches = bench.batches(dataset, chats.batch_size)
            assert layout.stages is not None
            factors = layout.stages.parameters()
            variants[f"hpcmlx{suffix}"] = Variant(bench.tuner(layout, batches, dataset).run)
            theirs = partial(MlxLmTuner, model, LORA, OPTIM, factors)
            variants[f"mlx-lm{suffix}"] = _their_variant(theirs(), batches, dataset, recompute)
            if not suffix:
                plain = theirs(compiled=False)
                variants["mlx-lm, not compiled"] = _their_variant(plain, batches, dataset, False)
        return report(in_turn(rounds, variants), lambda name: name.replace("hpcmlx", "mlx-lm"))


def _their_variant(
    theirs: MlxLmTuner, batches: Again, dataset: Dataset, recompute: bool
) -> Variant:
    own = theirs.batches(dataset, [batches.step(n) for n in range(batches.num_steps)])

    def run() -> Run:
        begin = time.perf_counter()
        losses = tuple(theirs.step(batch) for batch in own)
        return Run(time.perf_counter() - begin, losses, int(dataset.lengths.sum()))

    return Variant(run, partial(checkpointed, theirs.model) if recompute else nullcontext)


def train_layouts(model: str, rounds: int, chats: Chats) -> dict[str, Any]:
    """dp2, pp2 and tp2 against one rank with the same global batches, in eight microbatches.

    `apart` is what this host allows at most: two processes that train at the same time, each on
    what it would have with dp2, and know nothing of each other.
    """
    world = comm.init()
    with Bench(model, chats, world) as bench:
        dataset = bench.dataset()
        micro = max(1, chats.batch_size // 8)
        variants = {}
        for name, dims in _LAYOUTS.items():
            batches = bench.batches(dataset, micro, dims.dp if dims else 1)
            layout = load(model, world, dims, target_share=dataset.target_share)
            variants[name] = Variant(bench.tuner(layout, batches, dataset).run)
        halves = bench.batches(dataset, micro, 2)
        halves.replica = world.rank
        alone = bench.tuner(load(model, Communicator(), ParallelDims()), halves, dataset)

        def apart() -> Run:
            world.barrier()
            runs: list[Run] = world.allgather(alone.run())
            losses = tuple(map(sum, zip(*(run.losses for run in runs), strict=True)))
            return replace(max(runs, key=lambda run: run.seconds), losses=losses)

        variants["apart"] = Variant(apart)
        # Each of `apart` goes where its own half leads: they agree with the others at first only.
        return report(in_turn(rounds, variants), lambda name: name if name == "apart" else "one")


# -- runs in turn --


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        run: on rank 0 it gives what it did.
        under: a context to run it in.
    """

    run: Callable[[], Run | None]
    under: Callable[[], AbstractContextManager[Any]] = nullcontext


def in_turn(rounds: int, variants: dict[str, Variant]) -> dict[str, list[Run | None]]:
    """Every variant once per round, after a round that counts only for its losses."""
    runs: dict[str, list[Run | None]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, variant in variants.items():
            with variant.under():
                runs[name].append(variant.run())
            mx.clear_cache()
    return runs


def report(
    runs: dict[str, list[Run | None]], truth: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """The runs as plain values, a list entry for each round; {} on ranks without results.

    Args:
        truth: the variant whose losses are compared with those of a variant.
    """
    found = {name: [run for run in series if run is not None] for name, series in runs.items()}
    if not all(found.values()):
        return {}
    return {
        name: {
            "seconds": [run.seconds for run in series[1:]],
            "tokens_per_sec": [run.num_tokens / run.seconds for run in series[1:]],
            "idle": [run.idle for run in series[1:]],
            "losses": [run.losses for run in series],
            "num_tokens": series[0].num_tokens,
            "loss_difference": max(
                abs(a - b)
                for ours, theirs in zip(series, found[truth(name)], strict=True)
                for a, b in zip(ours.losses, theirs.losses, strict=True)
            ),
        }
        for name, series in found.items()
    }
