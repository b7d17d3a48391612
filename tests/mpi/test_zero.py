"""Optimizers whose state (ZeRO-1) or whose parameters (tensor parallel) are spread over all ranks:
what one process computes alone, bit by bit.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.errors import IntegrityError
from hpcmlx.parallel.partition import Cut
from hpcmlx.training import zero
from hpcmlx.training.optim import Optimizer, OptimSettings
from hpcmlx.training.zero import Zero1, assign

pytestmark = pytest.mark.mpi

STEPS = 10


def parameters() -> dict[str, mx.array]:
    """Odd sizes, two dtypes, one that is larger than a piece, one without axes."""
    shapes = {"embed": (61, 16), "bias": (7,), "gain": (), "narrow": (9, 3)}
    shapes |= {f"layers.{i}.weight": (17, 5 + i) for i in range(9)}
    rng = np.random.default_rng(0)
    made = {name: mx.array(rng.standard_normal(s, np.float32)) for name, s in shapes.items()}
    for name in ("bias", "narrow", "layers.3.weight"):
        made[name] = made[name].astype(mx.bfloat16)
    return made


def gradients(params: dict[str, mx.array], step: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(step + 1)
    return {n: mx.array(rng.standard_normal(a.shape, np.float32)) for n, a in params.items()}


def assert_same(ours: dict[str, mx.array], truth: dict[str, mx.array]) -> None:
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        assert ours[name].dtype == value.dtype
        assert mx.array_equal(ours[name], value).item(), name


def whole_run(settings: OptimSettings, stop: int = STEPS) -> tuple[dict, Optimizer]:
    params, optimizer = parameters(), Optimizer(settings, STEPS)
    for step in range(stop):
        params = optimizer.update(params, gradients(params, step), step)
        mx.eval(params, optimizer.state)
    return params, optimizer


def sharded(world, settings: OptimSettings) -> Zero1:
    sizes = {name: value.nbytes for name, value in parameters().items()}
    return Zero1(Optimizer(settings, STEPS), world, sizes)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "param"])
def test_bitwise_as_without(world, monkeypatch, name, dtype):
    monkeypatch.setattr(zero, "PIECE", 1000)
    monkeypatch.setattr(zero, "_MESSAGE", 777)
    extra = {"adamw_learning_rate": 0.003} if name == "muon" else {}
    settings = OptimSettings(name, 0.01, "cosine", weight_decay=0.1, state_dtype=dtype, **extra)
    truth, whole = whole_run(settings)
    params, optimizer = parameters(), sharded(world, settings)
    for step in range(STEPS):
        grads = gradients(params, step)
        # Nobody but the owner needs a gradient.
        grads = {n: g for n, g in grads.items() if optimizer.owner(n) == world.rank}
        params = optimizer.update(params, grads, step)
    assert_same(params, truth)
    # What the ranks remember is what the whole one remembers, each tensor once.
    names = sum(world.allgather(sorted(optimizer.state)), [])
    assert sorted(names) == sorted(whole.state)
    assert_same(optimizer.state, {n: whole.state[n] for n in optimizer.state})


def test_each_holds_its_share(world):
    params = {f"layers.{i}.weight": mx.zeros((40, 10 + i % 4)) for i in range(24)}
    sizes = {name: value.nbytes for name, value in params.items()}
    optimizer = Zero1(Optimizer(OptimSettings("adamw"), STEPS), world, sizes)
    optimizer.init(params)
    mine = sum(value.nbytes for value in optimizer.state.values())
    assert mine == pytest.approx(2 * sum(sizes.values()) / world.size, rel=0.05)


def test_a_resumed_run_is_the_same(world):
    settings = OptimSettings("adamw", 0.01, "linear", weight_decay=0.1)
    truth, _ = whole_run(settings)
    params, before = whole_run(settings, stop=4)
    optimizer = sharded(world, settings)
    optimizer.init(params)
    optimizer.restore(before.state)
    for step in range(4, STEPS):
        params = optimizer.update(params, gradients(params, step), step)
    assert_same(params, truth)


def test_owned_state_that_is_not_there_is_refused(world):
    params, before = whole_run(OptimSettings("adamw"), stop=1)
    optimizer = sharded(world, OptimSettings("adamw"))
    optimizer.init(params)
    lost = min(optimizer.state)
    with pytest.raises(IntegrityError, match=f"{lost} is missing"):
        optimizer.restore({n: v for n, v in before.state.items() if n != lost})


class Columns:
    """Matrices are cut along their last axis, of equal parts; vectors are whole."""

    def __init__(self, world):
        self.world = world

    def gather(self, path: str, array: mx.array) -> mx.array:
        if array.ndim < 2:
            return array
        return mx.swapaxes(self.world.all_gather(mx.swapaxes(array, 0, -1)), 0, -1)

    def local(self, path: str, whole: mx.array) -> mx.array:
        return whole if whole.ndim < 2 else mx.split(whole, self.world.size, -1)[self.world.rank]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion"])
def test_cut_parameters_are_updated_as_whole_ones(world, name):
    columns, rng = Columns(world), np.random.default_rng(0)
    shapes = {"matrix": (5, 6 * world.size), "experts": (2, 3, world.size), "vector": (4,)}
    truth = {n: mx.array(rng.standard_normal(s, np.float32)) for n, s in shapes.items()}
    extra = {"adamw_learning_rate": 0.003} if name == "muon" else {}
    settings = OptimSettings(name, 0.01, weight_decay=0.1, **extra)
    whole, spread = Optimizer(settings, STEPS), Optimizer(settings, STEPS, columns)
    mine = {n: columns.local(n, value) for n, value in truth.items()}
    for step in range(STEPS):
        grads = gradients(truth, step)
        mine = spread.update(mine, {n: columns.local(n, g) for n, g in grads.items()}, step)
        truth = whole.update(truth, grads, step)
        mx.eval(mine, spread.state, truth, whole.state)
    assert_same(mine, {n: columns.local(n, value) for n, value in truth.items()})
    cuts = {"matrix": Cut(1, ()), "experts": Cut(2, ()), "vector": None}
    for state, value in whole.state.items():
        if spread.state_cut(state, cuts) is not None:
            value = columns.local(state, value)
        assert_same({state: spread.state[state]}, {state: value})


def test_owners(world):
    sizes = {"a": 8, "b": 5, "c": 4, "d": 4, "e": 1}
    assert assign(sizes, 2) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}
    assert assign(dict(reversed(sizes.items())), 2) == assign(sizes, 2)
    assert assign({"a": 1}, 3) == {"a": 0}
