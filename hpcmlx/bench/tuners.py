"""What the benchmark of fine-tuning trains: examples, a model on a layout, and updates that can be
made again and again. `training.py` and `training_costs.py` measure them.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hpcmlx.bench.measure import on_rank_0
from hpcmlx.bench.rows import WORDS
from hpcmlx.comm import Communicator
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.training.data.batches import Batches, Step
from hpcmlx.training.data.dataset import Dataset, open_dataset
from hpcmlx.training.data.examples import ExampleSettings
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


@dataclass(frozen=True)
class Chats:
    """What is trained on: a question and an answer of ordinary words, in the chat template, the
    answer being learned.

    Attributes:
        num_steps: updates of one run, each with examples of its own.
        batch_size: examples of an update.
        num_words: of a question, and of an answer (least, most).
        alike: all examples are the same one.
    """

    num_steps: int = 4
    batch_size: int = 8
    num_words: tuple[int, int] = (3, 80)
    seed: int = 1
    alike: bool = False

    def write(self, path: Path) -> None:
        """The same examples every time, as JSONL."""
        rng, words = random.Random(self.seed), WORDS.split()
        with path.open("w") as file:
            for _ in range(self.num_steps * self.batch_size):
                if self.alike:
                    rng.seed(self.seed)
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
    target_share: float = 1.0,
) -> Layout:
    """The model on a layout of `world`; by default on its rank 0 alone. Collective."""
    mesh = Mesh(dims, world) if dims else Mesh(ParallelDims(), Communicator())
    stages = None
    if dims or world.rank == 0:
        stages = load_stages(model, mesh, method, recompute=recompute, target_share=target_share)
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
