"""Training runs without jobs: a Trainer over a mesh of the test's ranks, on a tiny model, with
examples in memory; and the twin that it is compared with."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes

from hpcmlx.mesh import Mesh
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.data.batches import Batches, Step
from hpcmlx.training.data.examples import Sample
from hpcmlx.training.executor import Executor
from hpcmlx.training.methods import Method
from hpcmlx.training.optim import Optimizer, OptimSettings
from hpcmlx.training.placement import Gathered
from hpcmlx.training.reduce import GradientSum
from hpcmlx.training.stages import Stages, load_stages
from hpcmlx.training.trainer import StepResult, Trainer
from hpcmlx.training.zero import Zero1
from tests.layouts import Layout
from tests.tiny_configs import CONFIGS
from tests.training_twin import TwinTrainer
from tests.twin import load_twin, save_checkpoint

MAX_LENGTH = 16
FULL = Method("full")
# With MLX's eps of 1e-8 a gradient that is nothing but rounding moves its parameter by all of the
# learning rate, up or down.
ADAMW = OptimSettings("adamw", 1e-3, eps=1e-5)


@dataclass(frozen=True)
class TrainLayout(Layout):
    """A layout with what only training has."""

    schedule: str = "1f1b"
    num_chunks: int = 1
    zero1: bool = False

    def __str__(self) -> str:
        schedule = "" if self.schedule == "1f1b" else f"_{self.schedule}"
        return super().__str__() + schedule + ("_zero1" if self.zero1 else "")


@dataclass(frozen=True)
class Setup:
    """What is trained and how, in any layout."""

    method: Method = FULL
    optim: OptimSettings = ADAMW
    total_steps: int = 20
    clip_norm: float | None = 1.0
    recompute: bool = True
    loss_chunk: int = 1024
    options: tuple[tuple[str, Any], ...] = ()  # of load_model


class Examples:
    """In memory what `Dataset` has on disk."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples
        self.lengths = np.array([len(s.tokens) for s in samples], np.int32)
        self.num_targets = np.array([s.targets.sum() for s in samples], np.int32)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def sample(seed: int, length: int, prompt: int = 1, vocab: int = 128) -> Sample:
    """Random tokens, of which the first `prompt` are no targets."""
    tokens = np.random.default_rng(seed).integers(1, vocab, length).astype(np.int32)
    return Sample(tokens, np.arange(length) >= prompt)


def examples(count: int, seed: int = 0, vocab: int = 128) -> Examples:
    """Examples of 3 to 14 tokens."""
    rng = np.random.default_rng(seed)
    sizes = [(int(n), int(rng.integers(1, n))) for n in rng.integers(3, 15, count)]
    return Examples([sample(1000 * seed + i, n, p, vocab) for i, (n, p) in enumerate(sizes)])


def batches(data: Examples, dp: int, num_steps: int, **options: Any) -> Batches:
    """Global batches of 6 rows in microbatches of at most 2, of several lengths."""
    common: dict[str, Any] = {
        "seed": 3,
        "global_batch_size": 6,
        "micro_batch_size": 2,
        "max_length": MAX_LENGTH,
        "pad_to": 4,
    }
    return Batches(data.lengths, data.num_targets, dp=dp, num_steps=num_steps, **common | options)


def whole_batch(data: Examples, plan: Step) -> tuple[mx.array, mx.array]:
    """(tokens, targets), each [rows, longest]: the step's examples one a row, as the twin wants."""
    samples = [data[i] for i in plan.ids]
    shape = len(samples), max(len(s.tokens) for s in samples)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, one in enumerate(samples):
        tokens[row, : len(one.tokens)], targets[row, : len(one.tokens)] = one.tokens, one.targets
    return mx.array(tokens), mx.array(targets)


class _KeptSum(GradientSum):
    """Keeps the gradients of the last step."""

    last: dict[str, mx.array]

    def finish(self) -> dict[str, mx.array]:
        self.last = super().finish()
        return dict(self.last)


@dataclass
class Run:
    """This rank's part of a run.

    Attributes:
        first: of every trained parameter its value before the first step, this rank's part.
    """

    mesh: Mesh
    stages: Stages
    trainer: Trainer
    sums: _KeptSum
    first: dict[str, mx.array]
    optimizer: Optimizer | Zero1

    def train(self, data: Examples, plan: Batches, start: int, stop: int) -> list[StepResult]:
        return [self.trainer.step(n, plan, data) for n in range(start, stop)]

    def gather(self, arrays: Mapping[str, mx.array]) -> Gathering | None:
        """On world rank 0 what every rank has of trained parameters or their gradients."""
        places = self.stages.places
        mine = {n: (places[n].shape, places[n].cut, np.array(a)) for n, a in arrays.items()}
        everyone = self.mesh.world.gather(mine)
        return None if everyone is None else Gathering(everyone)


@contextmanager
def open_run(path: Path, mesh: Mesh, layout: TrainLayout, setup: Setup) -> Iterator[Run]:
    """Load and build. Of LoRA's factors none begins with zeros here, so that each has a gradient
    from the first step on."""
    num_layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    stages = load_stages(
        str(path),
        mesh,
        setup.method,
        num_chunks=layout.num_chunks,
        recompute=setup.recompute,
        loss_chunk=setup.loss_chunk,
        tp_shares=layout.tp_shares,
        pp_layers=layout.layers(num_layers),
        **dict(setup.options),
    )
    ups = {n: p for n, p in stages.places.items() if n.endswith(".lora_up")}
    shaken = {n: mx.contiguous(place.local(_noise(n, place.shape))) for n, place in ups.items()}
    stages.set_parameters(stages.parameters() | shaken)
    mx.eval(stages.parameters())
    optimizer: Any = Optimizer(
        setup.optim, setup.total_steps, Gathered(mesh.tp_group, stages.places)
    )
    if layout.zero1:
        sizes = {name: math.prod(place.shape) for name, place in stages.places.items()}
        optimizer = Zero1(optimizer, mesh.dp_group, sizes)
    with _KeptSum(mesh, stages.places) as sums:
        trainer = Trainer(
            mesh,
            stages,
            Executor(mesh, stages.chunks, recompute=setup.recompute, bucket_bytes=4096),
            sums,
            optimizer,
            schedule=layout.schedule,
            clip_norm=setup.clip_norm,
        )
        yield Run(mesh, stages, trainer, sums, stages.parameters(), optimizer)


def _noise(name: str, shape: tuple[int, ...]) -> mx.array:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return mx.array(0.05 * rng.standard_normal(shape, np.float32))


class Gathering:
    """Parts of tensors from all ranks."""

    def __init__(
        self, parts: Sequence[Mapping[str, tuple[tuple[int, ...], Cut | None, np.ndarray]]]
    ):
        self._parts = parts

    def whole(self) -> dict[str, np.ndarray]:
        """Put together; every position of every tensor is there."""
        found: dict[str, np.ndarray] = {}
        for rank in self._parts:
            for name, (shape, cut, part) in rank.items():
                found.setdefault(name, np.full(shape, np.nan, np.float32))[_index(cut)] = part
        for name, array in found.items():
            assert not np.isnan(array).any(), f"some of {name} is on no rank, or not a number"
        return found

    def error(self, truth: Mapping[str, np.ndarray]) -> tuple[float, str]:
        """The largest difference of any rank's part, copies included, from the true tensor, in
        units of the tensor's largest number; and whose it is."""
        whole = self.whole()
        assert whole.keys() == truth.keys(), set(whole) ^ set(truth)
        worst = 0.0, ""
        for number, rank in enumerate(self._parts):
            for name, (shape, cut, part) in rank.items():
                expected = truth[name].astype(np.float64)
                assert expected.shape == shape, name
                difference = np.abs(part.astype(np.float64) - expected[_index(cut)]).max()
                relative = float(difference) / max(float(np.abs(expected).max()), 1e-30)
                worst = max(worst, (relative, f"{name} on rank {number}"))
        return worst


def _index(cut: Cut | None) -> Any:
    if cut is None:
        return ...
    spans = [np.arange(start, stop) for start, stop in cut.intervals]
    return (*[slice(None)] * cut.axis, np.concatenate(spans))


# -- the twin --

_TWIN_NAMES = {"lora_down": "lora_a", "lora_up": "lora_b", "dora_magnitude": "m"}
_OUR_NAMES = {theirs: ours for ours, theirs in _TWIN_NAMES.items()}


@dataclass(frozen=True)
class Truth:
    """What the twin did. Tensors have our names and shapes.

    Attributes:
        first: values before the first step.
        grads: of the first step.
        norms: of the gradients, before they were clipped.
        last: values after all steps.
    """

    first: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    losses: list[float]
    norms: list[float]
    last: dict[str, np.ndarray]


def twin_truth(
    path: Path,
    setup: Setup,
    data: Examples,
    plan: Batches,
    num_steps: int,
    first: Mapping[str, np.ndarray],
) -> Truth:
    """Train mlx-lm's model, with LoRA as mlx-lm puts it there.

    Args:
        first: what the factors begin with.
    """
    model, method = load_twin(path), setup.method
    if method.kind != "full":
        model.freeze()
        count = method.num_layers or len(model.layers)
        config = {"rank": method.rank, "scale": method.scale, "dropout": 0.0}
        linear_to_lora_layers(model, count, config, use_dora=method.kind == "dora")
    twin = TwinTrainer(model, setup.optim, setup.total_steps, max_norm=setup.clip_norm or 0.0)
    begin = {name: np.array(a) for name, a in to_ours(twin.params).items()}
    if method.kind != "full":
        twin.params = to_theirs({n: mx.array(first[n]) for n in begin})
        begin = {n: np.array(a) for n, a in to_ours(twin.params).items()}
    for n in range(num_steps):
        twin.step(*whole_batch(data, plan.step(n)))
    return Truth(
        begin,
        {n: np.array(g) for n, g in to_ours(twin.steps[0].grads).items()},
        [step.loss for step in twin.steps],
        [step.grad_norm for step in twin.steps],
        {n: np.array(a) for n, a in to_ours(twin.params).items()},
    )


def to_ours(params: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """mlx-lm's names of factors and their shapes -> ours."""
    return dict(_renamed(item, _OUR_NAMES) for item in params.items())


def to_theirs(params: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The other way."""
    return dict(_renamed(item, _TWIN_NAMES) for item in params.items())


def _renamed(item: tuple[str, mx.array], names: Mapping[str, str]) -> tuple[str, mx.array]:
    path, _, role = item[0].rpartition(".")
    if role not in names:
        return item
    flip = item[1].ndim == 2  # experts' factors are as ours
    return f"{path}.{names[role]}", item[1].T if flip else item[1]


# -- models --

# Beside those of tests/tiny_configs.py: (its name there, what is different).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_kv1": ("llama", {"num_key_value_heads": 1}),
    "llama_4bit": ("llama", {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}),
    "llama_61_layers": ("llama", {"num_hidden_layers": 61}),
    "llama_9_heads": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3}),
}


def config_of(name: str) -> dict[str, Any]:
    base, changes = VARIANTS.get(name, (name, {}))
    return CONFIGS[base] | changes


def save_model(path: Path, name: str) -> Path:
    """A checkpoint of a random model, the same in every call; packed if its name says so."""
    config = config_of(name)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = []
    for key, value in tree_flatten(model.parameters()):
        noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(value.shape)
        matrix = value.ndim > 1
        start, scale = (0, value.shape[-1] ** -0.5) if matrix else (value, 0.2)
        weights.append((key, start + mx.array((scale * noise).astype(np.float32))))
    model.load_weights(weights)
    if name.endswith("4bit"):
        nn.quantize(model, group_size=32, bits=4)
        config |= {"quantization": {"group_size": 32, "bits": 4}}
    return save_checkpoint(model, config, path)
