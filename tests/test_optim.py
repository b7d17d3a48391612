"""Optimizers: the numbers of torch, of MLX's own and of a formula; nothing lost at a resume."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.optim import Optimizer, OptimSettings, clip_scale, schedule

STEPS = 20
RATE = 0.01
# Paths of a nested tree, a list of layers in it, in order.
SHAPES = {
    "embed_tokens.weight": (40, 8),
    "layers.0.mlp.bias": (12,),
    "layers.0.mlp.weight": (12, 8),
    "layers.1.mlp.weight": (8, 12),
    "layers.1.norm.weight": (8,),
}


def tensors(seed: int, shapes: dict = SHAPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def to_mlx(arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in arrays.items()}


def steps(optimizer: Optimizer, params: dict, start: int = 0, stop: int = STEPS) -> list[dict]:
    """The parameters after each of these steps."""
    after = []
    shapes = {name: value.shape for name, value in params.items()}
    for step in range(start, stop):
        params = optimizer.update(params, to_mlx(tensors(1000 + step, shapes)), step)
        mx.eval(params, optimizer.state)
        after.append(params)
    return after


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        a, b = np.array(ours[name]), np.array(value)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert mx.array_equal(ours[name], value).item(), name


TORCH_CASES = {
    "adamw": ("AdamW", {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6}),
    "adamw-default": ("AdamW", {"weight_decay": 0.01}),
    "adam": ("Adam", {"betas": (0.8, 0.99)}),
    "sgd": ("SGD", {"weight_decay": 0.1}),
    "sgd-momentum": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("case", TORCH_CASES)
def test_as_torch(case):
    torch = pytest.importorskip("torch", reason="NOT CHECKED: torch's optimizers (install torch)")
    kind, options = TORCH_CASES[case]
    settings = OptimSettings(kind.lower(), RATE, "cosine", warmup_steps=3, **options)
    optimizer = Optimizer(settings, STEPS)
    theirs = {name: torch.tensor(value) for name, value in tensors(0).items()}
    groups = [
        {"params": [v for v in theirs.values() if v.ndim > 1]},
        {"params": [v for v in theirs.values() if v.ndim < 2], "weight_decay": 0.0},
    ]
    truth = getattr(torch.optim, kind)(groups, lr=RATE, **options)
    for step, ours in enumerate(steps(optimizer, to_mlx(tensors(0)))):
        for name, gradient in tensors(1000 + step).items():
            theirs[name].grad = torch.tensor(gradient)
        for group in truth.param_groups:
            group["lr"] = optimizer.learning_rate(step)
        truth.step()
        assert_close(ours, {name: value.numpy() for name, value in theirs.items()}, 3e-7)


def test_lion_as_its_formula():
    settings = OptimSettings("lion", RATE, betas=(0.9, 0.98), weight_decay=0.1)
    params, momentum = tensors(0), dict.fromkeys(SHAPES, np.float32(0))
    for step, ours in enumerate(steps(Optimizer(settings, STEPS), to_mlx(params))):
        for name, g in tensors(1000 + step).items():
            decay = 0.1 if params[name].ndim > 1 else 0
            c, p, m = 0.9 * momentum[name] + 0.1 * g, params[name], momentum[name]
            params[name] = p - RATE * (np.sign(c) + decay * p)
            momentum[name] = 0.98 * m + 0.02 * g
        assert_close(ours, params)


def mlx_steps(optimizer: optim.Optimizer, params: dict) -> list[dict]:
    """The same steps with MLX's own way of walking through nested trees."""
    after = []
    for step in range(STEPS):
        nested = tree_unflatten(list(to_mlx(tensors(1000 + step)).items()))
        params = optimizer.apply_gradients(nested, tree_unflatten(list(params.items())))
        mx.eval(params)
        params = dict(tree_flatten(params))
        after.append(params)
    return after


def is_matrix(path: str, gradient: mx.array) -> bool:
    return gradient.ndim > 1


def test_adafactor_as_mlx():
    options = {"learning_rate": RATE, "relative_step": False}
    kinds = [optim.Adafactor(weight_decay=decay, **options) for decay in (0.1, 0.0)]
    theirs = mlx_steps(optim.MultiOptimizer(kinds, [is_matrix]), to_mlx(tensors(0)))
    optimizer = Optimizer(OptimSettings("adafactor", RATE, weight_decay=0.1), STEPS)
    for a, b in zip(steps(optimizer, to_mlx(tensors(0))), theirs, strict=True):
        assert_close(a, b)
    assert optimizer.state["layers.0.mlp.weight/exp_avg_sq_row"].shape == (12,)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_as_mlx_with_adamw_beside_it(nesterov):
    muon = optim.Muon(RATE, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    adamw = [optim.AdamW(0.002, weight_decay=d, bias_correction=True) for d in (0.1, 0.0)]
    filters = [lambda path, g: g.ndim > 1 and "embed" not in path, is_matrix]
    theirs = mlx_steps(optim.MultiOptimizer([muon, *adamw], filters), to_mlx(tensors(0)))
    settings = OptimSettings(
        "muon", RATE, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adamw_learning_rate=0.002
    )
    ours = steps(Optimizer(settings, STEPS), to_mlx(tensors(0)))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_muon_takes_a_stack_of_experts_one_by_one():
    stack = {"experts.weight": (3, 6, 4)}
    settings = OptimSettings("muon", RATE)
    whole = steps(Optimizer(settings, 3), to_mlx(tensors(0, stack)), stop=3)[-1]["experts.weight"]
    for expert in range(3):
        alone = {"weight": mx.array(tensors(0, stack)["experts.weight"][expert])}
        optimizer = Optimizer(settings, 3)
        for step in range(3):
            gradient = tensors(1000 + step, stack)["experts.weight"][expert]
            alone = optimizer.update(alone, {"weight": mx.array(gradient)}, step)
        assert_close(alone, {"weight": whole[expert]})


RESUMED = {
    "adamw": {"weight_decay": 0.1},
    "adam": {},
    "sgd": {"momentum": 0.9},
    "adafactor": {},
    "lion": {"weight_decay": 0.1},
    "muon": {"adamw_learning_rate": 0.002},
}


@pytest.mark.parametrize("dtype", ["float32", "param"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bitwise_the_same(name, dtype):
    settings = OptimSettings(name, RATE, "cosine", state_dtype=dtype, **RESUMED[name])
    start = {n: v.astype(mx.bfloat16) for n, v in to_mlx(tensors(0)).items()}
    first = Optimizer(settings, STEPS)
    whole = steps(first, start)
    before = Optimizer(settings, STEPS)
    params = steps(before, start, stop=7)[-1]
    after = Optimizer(settings, STEPS)
    after.init(params)
    after.restore(before.state)
    assert_equal(steps(after, params, start=7)[-1], whole[-1])
    assert_equal(after.state, first.state)


def test_bfloat16_parameters_are_casts_of_a_float32_run():
    settings = OptimSettings("adamw", 1e-3, weight_decay=0.1)
    low = {n: v.astype(mx.bfloat16) for n, v in to_mlx(tensors(0)).items()}
    high = {n: v.astype(mx.float32) for n, v in low.items()}
    optimizer = Optimizer(settings, STEPS)
    ours, truth = steps(optimizer, low)[-1], steps(Optimizer(settings, STEPS), high)[-1]
    assert_equal({n: optimizer.state[f"{n}/master"] for n in SHAPES}, truth)
    assert_equal(ours, {n: v.astype(mx.bfloat16) for n, v in truth.items()})
    # Steps this small are lost where the parameter is all that is kept.
    ones = {"weight": mx.ones((8, 8), mx.bfloat16)}
    for dtype, moves in (("param", False), ("float32", True)):
        settings = OptimSettings("sgd", 1e-3, state_dtype=dtype)
        optimizer, after = Optimizer(settings, STEPS), ones
        for step in range(STEPS):
            after = optimizer.update(after, ones, step)
        assert mx.array_equal(after["weight"], ones["weight"]).item() is not moves


def test_state_in_the_dtype_of_the_parameter():
    optimizer = Optimizer(OptimSettings("adamw", state_dtype="param"), STEPS)
    optimizer.init({"a": mx.zeros((2, 2), mx.bfloat16), "b": mx.zeros(3)})
    assert {n: v.dtype for n, v in optimizer.state.items()} == {
        "a/m": mx.bfloat16, "a/v": mx.bfloat16, "b/m": mx.float32, "b/v": mx.float32
    }  # fmt: skip


def test_what_decays():
    settings = OptimSettings("adamw", RATE, weight_decay=0.5, no_decay=("*embed*", "layers.1.*"))
    params = to_mlx(tensors(0))
    zeros = {name: mx.zeros_like(value) for name, value in params.items()}
    after = Optimizer(settings, STEPS).update(params, zeros, 0)
    decayed = {n for n in params if not mx.array_equal(after[n], params[n]).item()}
    assert decayed == {"layers.0.mlp.weight"}
    expected = params["layers.0.mlp.weight"] * (1 - RATE * 0.5)
    assert_close({"w": after["layers.0.mlp.weight"]}, {"w": expected})


def test_how_state_is_cut():
    cuts = {"w": Cut(1, ((0, 4),)), "b": None}
    adam = Optimizer(OptimSettings("adamw"), 1)
    names = ("w/m", "w/v", "w/master", "b/m")
    assert [adam.state_cut(name, cuts) for name in names] == [cuts["w"]] * 3 + [None]
    factored = Optimizer(OptimSettings("adafactor"), 1)
    factored.init({"w": mx.zeros((4, 4), mx.bfloat16)})
    by_name = {name: factored.state_cut(name, cuts) for name in factored.state}
    rows, columns = "w/exp_avg_sq_row", "w/exp_avg_sq_col"
    assert by_name == {"w/master": cuts["w"], rows: None, columns: None}


def factors(total: int, **settings) -> list[float]:
    factor = schedule(OptimSettings(**settings), total)
    return [factor(step) for step in range(total)]


def test_schedules():
    def check(ours: list[float], truth) -> None:
        np.testing.assert_allclose(ours, truth, rtol=1e-6)

    n = np.arange(10)
    check(factors(10, schedule="constant"), np.ones(10))
    check(factors(10, schedule="linear", min_lr_ratio=0.2), 1 - 0.8 * n / 10)
    cosine = 0.1 + 0.9 * (1 + np.cos(math.pi * n / 10)) / 2
    check(factors(10, schedule="cosine", min_lr_ratio=0.1), cosine)
    stairs = {"decay_rate": 0.5, "decay_every": 4}
    check(factors(10, schedule="step", **stairs), 0.5 ** (n // 4))
    check(factors(10, schedule="exponential", **stairs), 0.5 ** (n / 4))
    check(factors(10, schedule="step", min_lr_ratio=0.4, **stairs), [1] * 4 + [0.5] * 4 + [0.4] * 2)
    # A warm-up goes before; no step of it is without effect.
    warm = factors(14, schedule="cosine", min_lr_ratio=0.1, warmup_steps=4)
    check(warm, [0.2, 0.4, 0.6, 0.8, *cosine])


REFUSED = [
    ({"name": "adamv"}, "'adamv', it must be one of adamw"),
    ({"schedule": "cosin"}, "'cosin', it must be one of constant"),
    ({"state_dtype": "bf16"}, "float32 or param"),
    ({"learning_rate": 0.0}, "above 0"),
    ({"momentum": 0.9}, "momentum is 0.9, but adamw has none"),
    ({"name": "adam", "weight_decay": 0.1}, "weight_decay is 0.1, but adam has none"),
    ({"name": "sgd", "nesterov": True}, "Nesterov"),
    ({"betas": (0.9, 1.0)}, "beta2"),
    ({"warmup_steps": 10}, "must leave some of 10 steps"),
    ({"min_lr_ratio": 1.5}, "between 0 and 1"),
    ({"decay_every": 0}, "not a decay"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda x: str(x)[:24])
def test_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Optimizer(OptimSettings(**settings), 10)


def test_muon_does_not_guess_a_learning_rate():
    with pytest.raises(ConfigError, match="embed_tokens.weight: AdamW does"):
        Optimizer(OptimSettings("muon"), 1).init(to_mlx(tensors(0)))


def test_another_state_is_refused():
    params = to_mlx(tensors(0))
    optimizer = Optimizer(OptimSettings("adamw"), 1)
    optimizer.init(params)
    state = dict(optimizer.state)
    name = "layers.0.mlp.weight/v"
    bad = {
        f"{name} is missing": {n: v for n, v in state.items() if n != name},
        "other/m is not of this optimizer": state | {"other/m": mx.zeros(1)},
        r"\[12, 7\], expected .*\[12, 8\]": state | {name: mx.zeros((12, 7))},
        "bfloat16 .*, expected mlx.core.float32": state | {name: mx.zeros((12, 8), mx.bfloat16)},
    }
    for message, stored in bad.items():
        with pytest.raises(IntegrityError, match=message):
            optimizer.restore(stored)
    with pytest.raises(ValueError, match="layers.0.mlp.bias"):
        optimizer.update(params, {n: v for n, v in params.items() if "bias" not in n}, 0)


def test_clip_scale():
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_scale(4.0, 0.0) == 1.0
    for norm in (math.nan, math.inf):
        with pytest.raises(ValueError, match="norm is"):
            clip_scale(norm, 1.0)
