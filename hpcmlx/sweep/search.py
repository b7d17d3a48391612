"""`hydra/sweeper=optuna`: Optuna is asked for points and told what became of them.

Nothing of Optuna's is kept on the disk: `sweep.yaml` and the runs say everything, so a search that
is started again tells a new study of the points that are complete, and asks for the others first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from hpcmlx.errors import UsageError
from hpcmlx.extras import require
from hpcmlx.record import completion
from hpcmlx.sweep.points import Sweep, metric

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

Run = Callable[[Sequence[Sequence[str]]], Sequence[float | None]]


@dataclass(frozen=True)
class Search:
    """What is asked of a search.

    Attributes:
        trials: points that are to be tried.
        at_once: of them, before Optuna hears of any.
        seed: of its draws.
    """

    trials: int
    at_once: int
    seed: int


def require_optuna() -> None:
    """
    Raises:
        ConfigError: it is not installed here.
    """
    require("optuna", "sweep", "hydra/sweeper=optuna", "give every value: key=a,b")


def run(arguments: Sequence[str], sweep: Sweep, options: Search, launch: Run) -> None:
    """Search until so many trials are there, those of earlier launches included.

    Args:
        arguments: overrides; those with several values or an `interval` are what is searched.
        launch: runs points; their metrics, None for one that has failed.

    Raises:
        UsageError: a range that cannot be searched.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parser = OverridesParser.create()
    overrides = [parser.parse_override(text) for text in arguments]
    space = {_key(o): distribution(o) for o in overrides if o.is_sweep_override()}
    heads = {_key(o): o.get_key_element() for o in overrides}
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    known, unfinished = _earlier(sweep, space)
    # A sampler that begins anew would draw again what it has drawn before.
    sampler = optuna.samplers.TPESampler(
        seed=options.seed + len(known), n_startup_trials=min(10, max(2, options.trials // 3))
    )
    direction = optuna.study.StudyDirection[sweep.direction.upper()]
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials(known)
    for params in unfinished:
        study.enqueue_trial(params)
    left = options.trials - len(known)
    while left > 0:
        trials = [study.ask(space) for _ in range(min(options.at_once, left))]
        left -= len(trials)
        points = [
            [*fixed, *(f"{heads[k]}={_text(v)}" for k, v in t.params.items())] for t in trials
        ]
        for trial, value in zip(trials, launch(points), strict=True):
            _tell(study, trial, value)


def distribution(override: Override) -> BaseDistribution:
    """What Optuna draws from, for `interval(a,b)`, `tag(log,interval(a,b))`, an integer `range`;
    anything else with several values is a choice between texts.

    Raises:
        UsageError: it is empty, or has no logarithm.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind: Any = IntDistribution if whole else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        texts = list(override.sweep_string_iterator())
        if override.is_range_sweep() and len(texts) > 1 and all(map(_is_int, texts)):
            low, high = sorted((int(texts[0]), int(texts[-1])))
            return IntDistribution(low, high, step=abs(int(texts[1]) - int(texts[0])))
        return CategoricalDistribution(texts)
    except ValueError as error:
        raise UsageError(f"override {override.input_line!a}: {error}") from None


def _earlier(sweep: Sweep, space: dict[str, BaseDistribution]) -> tuple[list[Any], list[Any]]:
    """Of an earlier launch: trials that are complete, and parameters of those that are not."""
    from optuna.trial import create_trial

    known, unfinished = [], []
    for point in sweep.points:
        if point.overrides.keys() != space.keys():
            continue
        params = {key: _value(space[key], text) for key, text in point.overrides.items()}
        if not all(space[k]._contains(space[k].to_internal_repr(v)) for k, v in params.items()):
            continue  # of a range that is another by now
        if completion(sweep.run_dir(point)) is None:
            unfinished.append(params)
        elif (value := metric(sweep.run_dir(point), sweep.metric)) is not None:
            known.append(create_trial(params=params, distributions=space, value=value))
    return known, unfinished


def _tell(study: Study, trial: Any, value: float | None) -> None:
    import optuna

    if value is None or value != value:  # NaN
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, value)


def _value(kind: BaseDistribution, text: str) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    try:
        if isinstance(kind, IntDistribution):
            return int(text)
        if isinstance(kind, FloatDistribution):
            return min(max(float(text), kind.low), kind.high)  # it was rounded
        return text
    except ValueError:
        return float("nan")


def _text(value: Any) -> str:
    """Four digits, which tell more than any search does, and fit into names."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def _is_int(text: str) -> bool:
    return text.lstrip("-").isdigit()
