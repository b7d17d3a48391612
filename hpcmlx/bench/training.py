"""Fine-tuning: one rank against mlx-lm's own trainer, and two ranks against one.

What is compared makes the same updates from the same first values on the same examples, in turn in
the same processes. LoRA of rank 8 on every projection, float32. `hpcmlx.bench` runs these.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from hpcmlx import comm
from hpcmlx.bench.measure import on_rank_0
from hpcmlx.bench.mlx_lm_training import MlxLmTuner, checkpointed
from hpcmlx.bench.rows import WORDS
from hpcmlx.comm import Communicator
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.training.batches import Batches, Step
from hpcmlx.training.dataset import Dataset, open_dataset
from hpcmlx.training.examples import ExampleSettings
from hpcmlx.training.executor import Executor
from hpcmlx.training.methods import Method
from hpcmlx.training.optim import Optimizer, OptimSettings
from hpcmlx.training.placement import Gathered
from hpcmlx.training.reduce import GradientSum
from hpcmlx.training.stages import Stages, load_stages
from hpcmlx.training.trainer import StepResult, Trainer

LORA = Method("lora", rank=8, scale=20.0)
OPTIM = OptimSettings("adam", learning_rate=1e-4)
_MAX_LENGTH = 2048
_LAYOUTS = {
    "one": None,
    "dp2": ParallelDims(dp=2),
    "pp2": ParallelDims(pp=2),
    "tp2": ParallelDims(tp=2),
}


@dataclass(frozen=True)
class Chats:
    """What is trained on: a question and an answer of ordinary words, in the chat template, the
    answer being learned.

    Attributes:
        num_steps: updates of one run, each with examples of its own.
        batch_size: examples of an update.
        num_words: of a question, and of an answer (least, most).
    """

    num_steps: int = 4
    batch_size: int = 8
    num_words: tuple[int, int] = (3, 80)
    seed: int = 1

    def write(self, path: Path) -> None:
        """The same examples every time, as JSONL."""
        rng, words = random.Random(self.seed), WORDS.split()
        with path.open("w") as file:
            for _ in range(self.num_steps * self.batch_size):
                texts = [" ".join(rng.choices(words, k=rng.randint(*self.num_words))) for _ in "qa"]
                roles = zip(("user", "assistant"), texts, strict=True)
                chat = [{"role": role, "content": text} for role, text in roles]
                file.write(json.dumps({"messages": chat}) + "\n")


class Again(Batches):
    """The same global batches in every run.

    Attributes:
        replica: whose microbatches are all there is, instead of those of all replicas.
    """

    replica: int | None = None

    def step(self, n: int) -> Step:
        """Step `n`, or the one that stands for it."""
        plan = super().step(n % self.num_steps)
        if self.replica is None:
            return plan
        return replace(plan, microbatches=(plan.microbatches[self.replica],))


@dataclass(frozen=True)
class Run:
    """What some updates took.

    Attributes:
        seconds: of all of them.
        losses: of each, before it.
        num_tokens: of the examples, padding left out.
        idle: share of the time that ranks waited for each other, by update.
    """

    seconds: float
    losses: tuple[float, ...]
    num_tokens: int
    idle: tuple[float, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A model ready to be trained on a layout of the world.

    Attributes:
        alone: rank 0 has it to itself.
        stages: None on a rank that has no part in it.
    """

    world: Communicator
    mesh: Mesh
    alone: bool
    stages: Stages | None
    recompute: bool


class Tuner:
    """Updates of a layout, which go on where the last run has ended."""

    def __init__(self, layout: Layout, batches: Again, dataset: Dataset, schedule: str):
        self.layout, self.batches, self.dataset = layout, batches, dataset
        self.steps_done = 0
        stages, mesh = layout.stages, layout.mesh
        if stages is None:
            return
        self.sums = GradientSum(mesh, stages.places)
        self.trainer = Trainer(
            mesh,
            stages,
            Executor(mesh, stages.chunks, recompute=layout.recompute),
            self.sums,
            Optimizer(OPTIM, batches.num_steps, Gathered(mesh.tp_group, stages.places)),
            schedule=schedule,
            clip_norm=None,
        )

    def step(self) -> StepResult:
        """One update. Collective over the layout."""
        result = self.trainer.step(self.steps_done, self.batches, self.dataset)
        self.steps_done += 1
        return result

    def run(self) -> Run | None:
        """Once through all batches; None on a rank that has no part in it."""
        return on_rank_0(self.layout.world, self._run) if self.layout.alone else self._run()

    def _run(self) -> Run:
        self.layout.mesh.world.barrier()
        begin = time.perf_counter()
        results = [self.step() for _ in range(self.batches.num_steps)]
        self.layout.mesh.world.barrier()
        return Run(
            time.perf_counter() - begin,
            tuple(result.loss for result in results),
            sum(result.num_tokens for result in results),
            tuple(result.idle for result in results),
        )


class Bench:
    """Examples, and what trains on them in several ways. A context manager, which keeps the
    examples in a directory of its own. Everything is collective over `world`."""

    def __init__(self, model: str, chats: Chats, world: Communicator):
        self.model, self.chats, self.world = model, chats, world
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        self._folder = Path(self._stack.enter_context(_folder(self.world)))
        if self.world.rank == 0:
            self.chats.write(self._folder / "chats.jsonl")
        self.world.barrier()
        self._tokenizer = load_tokenizer(self.model)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def dataset(self, targets: str = "assistant") -> Dataset:
        """The examples, tokenized."""
        dataset = open_dataset(
            [self._folder / "chats.jsonl"],
            self._tokenizer,
            ExampleSettings(_MAX_LENGTH, targets),
            self._folder / targets,
            self.world,
        )
        self._stack.callback(dataset.close)
        return dataset

    def batches(self, dataset: Dataset, micro_batch_size: int, dp: int = 1) -> Again:
        """Global batches that are all of `dataset`."""
        return Again(
            dataset.lengths,
            dataset.num_targets,
            seed=0,
            global_batch_size=self.chats.batch_size,
            micro_batch_size=micro_batch_size,
            max_length=_MAX_LENGTH,
            dp=dp,
            num_epochs=1,
        )

    def tuner(
        self, layout: Layout, batches: Again, dataset: Dataset, schedule: str = "1f1b"
    ) -> Tuner:
        """What trains a layout; it is closed with the bench."""
        tuner = Tuner(layout, batches, dataset, schedule)
        if layout.stages is not None:
            self._stack.enter_context(tuner.sums)
        return tuner


def load(
    model: str,
    world: Communicator,
    dims: ParallelDims | None = None,
    *,
    method: Method = LORA,
    recompute: bool = False,
) -> Layout:
    """The model on a layout of `world`; by default on its rank 0 alone. Collective."""
    mesh = Mesh(dims, world) if dims else Mesh(ParallelDims(), Communicator())
    stages = None
    if dims or world.rank == 0:
        stages = load_stages(model, mesh, method, recompute=recompute)
    return Layout(world, mesh, dims is None, stages, recompute)


@contextmanager
def _folder(world: Communicator) -> Iterator[str]:
    """A directory that all ranks see for as long as they need it."""
    folder = world.bcast(tempfile.mkdtemp(prefix="hpcmlx-bench-") if world.rank == 0 else None)
    try:
        yield folder
    finally:
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(folder)


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
            variants[name] = Variant(bench.tuner(load(model, world, dims), batches, dataset).run)
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
