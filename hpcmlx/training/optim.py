"""mlx.optimizers over flat dicts of parameters, with nothing hidden in counters.

Learning rate and bias correction are functions of the step that `update` is given, and all else
that an optimizer remembers is in `state`, under names that a checkpoint can store: a run that
resumes at any step goes on as if it had never stopped. The training loop and `zero.py` call this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.parallel.partition import Cut

_KINDS: dict[str, tuple[Any, set[str]]] = {
    "adamw": (optim.AdamW, {"betas", "eps", "weight_decay"}),
    "adam": (optim.Adam, {"betas", "eps"}),
    "sgd": (optim.SGD, {"momentum", "nesterov", "weight_decay"}),
    "adafactor": (optim.Adafactor, {"weight_decay"}),
    "lion": (optim.Lion, {"betas", "weight_decay"}),
    "muon": (optim.Muon, {"momentum", "nesterov", "weight_decay"}),
}
# MLX's defaults are no bias correction, and a learning rate that is ignored.
_FIXED: dict[str, dict[str, Any]] = {
    "adamw": {"bias_correction": True},
    "adam": {"bias_correction": True},
    "adafactor": {"relative_step": False},
}
_MASTER = "master"
# Averages over whole rows and columns: every tensor-parallel rank has all of them.
_WHOLE_ROLES = {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"}


@dataclass(frozen=True)
class OptimSettings:
    """Which optimizer, and how its learning rate moves. None: what MLX's optimizer has itself.

    Attributes:
        name: adamw | adam | sgd | adafactor | lion | muon.
        learning_rate: the largest one. Adafactor's counts in units of a parameter's RMS.
        schedule: constant | linear | cosine | step | exponential, after the warm-up.
        warmup_steps: step n of these has (n + 1) / (warmup_steps + 1) of the learning rate.
        min_lr_ratio: share of the learning rate where linear and cosine end, with the last step,
            and which step and exponential do not fall below.
        decay_rate, decay_every: step and exponential multiply the learning rate by this in this
            many steps, at once or little by little.
        weight_decay: for parameters with two axes and more that no pattern of `no_decay` matches.
        no_decay: patterns of parameter paths, as in `fnmatch`.
        betas, eps: of adamw, adam, lion (no eps) and of the AdamW beside muon.
        momentum, nesterov: of sgd and muon.
        adamw_for: with muon, the parameters that AdamW updates in its place, as do those with fewer
            than two axes; `adamw_learning_rate` is theirs, on the same schedule.
        state_dtype: float32, with a float32 copy of every parameter that has another dtype; or
            param, everything in the parameter's own.
    """

    name: str = "adamw"
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    decay_rate: float = 0.1
    decay_every: int = 1000
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    adamw_for: tuple[str, ...] = ("*embed_tokens*", "*embeddings*", "*wte*", "*lm_head*", "*conv*")
    adamw_learning_rate: float | None = None
    state_dtype: str = "float32"


class Whole(Protocol):
    """Whole tensors from the parts of the tensor-parallel ranks, which all call it in one order."""

    def gather(self, path: str, array: mx.array) -> mx.array:
        """The whole of something that is cut as parameter `path`, equal on every rank."""
        ...

    def local(self, path: str, whole: mx.array) -> mx.array:
        """This rank's part of it."""
        ...


class _Uncut:
    def gather(self, path: str, array: mx.array) -> mx.array:
        return array

    def local(self, path: str, whole: mx.array) -> mx.array:
        return whole


class Optimizer:
    """One of mlx.optimizers.

    Elementwise ones (all but Adafactor and Muon) work on what a rank holds. Adafactor gathers
    gradient and parameter; its factored state is that of the whole matrix, the same on every
    tensor-parallel rank, so it is to be stored once. Muon gathers the update, and every rank
    orthogonalizes the whole matrix; its momentum is cut as the parameter.

    Attributes:
        settings: as given.
        state: "parameter path/role" -> array; roles are those of MLX, and "master" for the float32
            copy of a parameter. Unevaluated after `update`, to be evaluated with the parameters.
    """

    def __init__(self, settings: OptimSettings, total_steps: int, whole: Whole | None = None):
        """
        Args:
            total_steps: of the whole run; the schedule ends there.
            whole: needed by adafactor and muon where tensor parallelism cuts parameters.

        Raises:
            ConfigError: a setting is unknown, out of range, or means nothing to this optimizer.
        """
        _check(settings)
        self.settings = settings
        self.state: dict[str, mx.array] = {}
        self._factor = schedule(settings, total_steps)
        self._whole = whole or _Uncut()
        self._roles: dict[str, list[str]] | None = None
        names = {"muon", "adamw"} if settings.name == "muon" else {settings.name}
        self._rules = {(n, d): _rule(n, settings, d) for n in names for d in (False, True)}

    def init(self, params: Mapping[str, mx.array]) -> None:
        """Make the state of step 0, of `params`. `update` does it where nobody has.

        Raises:
            ConfigError: muon leaves a parameter to AdamW, which has no learning rate.
        """
        self.state, self._roles = {}, {}
        for path in sorted(params):
            parameter, made = params[path], {}
            if self.settings.state_dtype == "float32" and parameter.dtype != mx.float32:
                made[_MASTER] = parameter = parameter.astype(mx.float32)
            rule = self._rule(path, parameter)
            if isinstance(rule, optim.Adafactor):
                parameter = self._gather(path, parameter)
            if not (isinstance(rule, optim.SGD) and rule.momentum <= 0):
                rule.init_single(parameter, made)
            self._roles[path] = list(made)
            self.state |= {f"{path}/{role}": value for role, value in made.items()}

    def update(
        self, params: Mapping[str, mx.array], grads: Mapping[str, mx.array], step: int
    ) -> dict[str, mx.array]:
        """The parameters after update number `step` (from 0), unevaluated, as is `state`.

        Args:
            params, grads: the same paths in both, every time.
        """
        if self._roles is None:
            self.init(params)
        known = (self._roles or {}).keys()
        if odd := sorted((params.keys() ^ known) | (grads.keys() ^ known)):
            raise ValueError(f"parameters, gradients and state are not of the same paths: {odd}")
        factor = self._factor(step)
        for (name, _), rule in self._rules.items():
            # A Python number where MLX takes one: 1 - beta ** step is off by 1e-5 in float32.
            rule.state["step"] = mx.array(step + 1) if name == "adafactor" else step + 1
            rule.state["learning_rate"] = mx.array(factor * self._peak(name))
        return {path: self._update(path, params[path], grads[path]) for path in sorted(params)}

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`."""
        return self._factor(step) * self.settings.learning_rate

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Go on with a stored state. `init` comes first: it tells what must be there.

        Raises:
            IntegrityError: names, shapes or dtypes are not those of this optimizer's state.
        """
        if self._roles is None:
            raise RuntimeError("init(params) comes before restore")
        if odd := sorted(state.keys() ^ self.state.keys()):
            what = "is not of this optimizer" if odd[0] in state else "is missing"
            raise IntegrityError(f"stored optimizer state: {odd[0]} {what} ({len(odd)} such names)")
        for name, own in self.state.items():
            stored = state[name]
            if (stored.shape, stored.dtype) != (own.shape, own.dtype):
                raise IntegrityError(
                    f"stored optimizer state: {name} is {stored.dtype} {list(stored.shape)}, "
                    f"expected {own.dtype} {list(own.shape)}"
                )
        self.state = {name: state[name] for name in self.state}

    def state_cut(self, name: str, cuts: Mapping[str, Cut | None]) -> Cut | None:
        """How state `name` is cut, where its parameters are cut as `cuts` says; None if whole."""
        path, _, role = name.rpartition("/")
        return None if role in _WHOLE_ROLES else cuts[path]

    def _peak(self, name: str) -> float:
        beside = self.settings.name == "muon" and name == "adamw"
        rate = self.settings.adamw_learning_rate if beside else self.settings.learning_rate
        return rate or 0.0  # none is needed: `_rule` refuses to use it then

    def _rule(self, path: str, parameter: mx.array) -> Any:
        settings, name = self.settings, self.settings.name
        decays = parameter.ndim > 1 and not _matches(path, settings.no_decay)
        if name == "muon" and (parameter.ndim < 2 or _matches(path, settings.adamw_for)):
            name = "adamw"
            if settings.adamw_learning_rate is None:
                raise ConfigError(
                    f"muon does not update {path}: AdamW does, so adamw_learning_rate is needed"
                )
        return self._rules[name, decays]

    def _gather(self, path: str, array: mx.array) -> mx.array:
        # The order in memory decides in which order MLX adds up, so in the last digits.
        return mx.contiguous(self._whole.gather(path, array))

    def _update(self, path: str, parameter: mx.array, gradient: mx.array) -> mx.array:
        assert self._roles is not None
        own = {role: self.state[f"{path}/{role}"] for role in self._roles[path]}
        before = own.pop(_MASTER, parameter)
        gradient = gradient.astype(before.dtype)
        rule = self._rule(path, before)
        if isinstance(rule, optim.Adafactor):
            gradient, before = self._gather(path, gradient), self._gather(path, before)
            after = self._whole.local(path, rule.apply_single(gradient, before, own))
        elif isinstance(rule, optim.Muon):
            after = self._muon(path, rule, gradient, before, own)
        else:
            after = rule.apply_single(gradient, before, own)
        if _MASTER in self._roles[path]:
            own[_MASTER] = after
        self.state |= {f"{path}/{role}": value for role, value in own.items()}
        return after.astype(parameter.dtype)

    def _muon(
        self,
        path: str,
        rule: optim.Muon,
        gradient: mx.array,
        parameter: mx.array,
        own: dict[str, mx.array],
    ) -> mx.array:
        """MLX's Muon, but for two things: the matrix may be spread over ranks, and three axes are a
        stack of matrices (experts, heads), each of which is orthogonalized for itself."""
        momentum = rule.momentum
        if rule.weight_decay:
            gradient = gradient + rule.weight_decay * parameter
        own["v"] = momentum * own["v"] + (1 - momentum) * gradient
        update = own["v"]
        if rule.nesterov:
            update = gradient * (1 - momentum) + own["v"] * momentum
        update = self._gather(path, update)
        shape = update.shape
        rows, columns = shape[-2:]
        matrices = [
            rule._zeropower_via_newtonschulz5(matrix, steps=rule.ns_steps)
            for matrix in update.reshape(-1, rows, columns)
        ]
        update = self._whole.local(path, mx.stack(matrices).reshape(shape))
        rate: mx.array = rule.learning_rate.astype(update.dtype) * max(1, rows / columns) ** 0.5
        return parameter - rate * update


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of global norm `norm` are multiplied with, so that it is at most `max_norm`
    (0: no limit), as in torch and MLX.

    Raises:
        ValueError: the norm is not finite: such gradients must not reach an optimizer.
    """
    if not isfinite(norm):
        raise ValueError(f"the gradients' norm is {norm}")
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def schedule(settings: OptimSettings, total_steps: int) -> Callable[[int], float]:
    """The share of the learning rate that each of `total_steps` steps has.

    Raises:
        ConfigError: the schedule is unknown or does not fit into the steps.
    """
    warmup, end = settings.warmup_steps, settings.min_lr_ratio
    steps = total_steps - warmup
    if not 0 <= warmup < total_steps:
        raise ConfigError(f"warmup_steps is {warmup}: it must leave some of {total_steps} steps")
    if not 0 <= end <= 1:
        raise ConfigError(f"min_lr_ratio is {end}: it must be between 0 and 1")
    rate, every = settings.decay_rate, settings.decay_every
    if not 0 < rate <= 1 or every < 1:
        raise ConfigError(f"decay_rate {rate}, decay_every {every}: not a decay")
    falls: dict[str, Callable[[int], Any]] = {
        "constant": lambda step: 1.0,
        "linear": optim.linear_schedule(1.0, end, steps),
        "cosine": optim.cosine_decay(1.0, steps, end),
        "step": optim.step_decay(1.0, rate, every),
        "exponential": optim.exponential_decay(1.0, rate ** (1 / every)),
    }
    if settings.schedule not in falls:
        raise ConfigError(
            f"schedule is {settings.schedule!r}, it must be one of {', '.join(falls)}"
        )
    fall = falls[settings.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        with mx.stream(mx.cpu):  # a number for the host: no GPU need wake up
            return max(end, float(fall(step - warmup)))

    return factor


def _check(settings: OptimSettings) -> None:
    name = settings.name
    if name not in _KINDS:
        raise ConfigError(f"optimizer is {name!r}, it must be one of {', '.join(_KINDS)}")
    if settings.state_dtype not in ("float32", "param"):
        raise ConfigError(f"state_dtype is {settings.state_dtype!r}, it must be float32 or param")
    if not settings.learning_rate > 0:
        raise ConfigError(f"learning_rate is {settings.learning_rate}: it must be above 0")
    takes = set(_KINDS[name][1])
    if name == "muon":
        takes |= {"betas", "eps", "adamw_learning_rate"}
    for key in ("betas", "eps", "momentum", "nesterov", "weight_decay", "adamw_learning_rate"):
        value = getattr(settings, key)
        if value not in (None, 0) and key not in takes:
            raise ConfigError(f"{key} is {value}, but {name} has none: leave it out")


def _rule(name: str, settings: OptimSettings, decays: bool) -> Any:
    """The MLX optimizer of one kind of parameters."""
    kind, takes = _KINDS[name]
    options = {key: getattr(settings, key) for key in takes} | _FIXED.get(name, {})
    if not decays:
        options["weight_decay"] = 0.0 if "weight_decay" in takes else None
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return kind(learning_rate=settings.learning_rate, **options)
    except ValueError as error:
        raise ConfigError(f"optimizer {name}: {error}") from None


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
