"""What a sweep goes over: the overrides of its command line, and of the experiment it names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcmlx.config import checked_override
from hpcmlx.errors import ConfigError, UsageError
from hpcmlx.settings import JobConfig

#: Hydra's names of what chooses the points: every combination, or a search.
SWEEPERS = ("basic", "optuna")
# Of Hydra's own keys these have another name here, where values are checked.
_ELSEWHERE = {
    "hydra.sweep.dir": "sweep.dir",
    "hydra.sweeper.n_trials": "sweep.trials",
    "hydra.sweeper.direction": "sweep.direction",
    "hydra.sweeper.n_jobs": "sweep.max_parallel",
    "hydra/launcher": "launch",
}


@dataclass(frozen=True)
class Space:
    """A sweep as it was asked for.

    Attributes:
        fixed: overrides of every point.
        swept: key or group -> the override with all its values, in Hydra's syntax.
        sweeper: one of `SWEEPERS`.
    """

    fixed: tuple[str, ...]
    swept: Mapping[str, str]
    sweeper: str

    @property
    def overrides(self) -> list[str]:
        return [*self.fixed, *self.swept.values()]

    def first(self) -> list[str]:
        """The overrides of one point, of every key its first value."""
        parser = OverridesParser.create()
        return [*self.fixed, *(_first(parser.parse_override(t)) for t in self.swept.values())]

    def values(self, overrides: Sequence[str]) -> dict[str, str]:
        """Of a point's overrides what is swept: key -> value as text."""
        found = {}
        for text in overrides:
            key, _, value = text.partition("=")
            if (key := key.lstrip("+")) in self.swept:
                found[key] = value
        return found


def read_space(
    cls: type[JobConfig], config_dir: str | Path, job: str, overrides: Sequence[str]
) -> Space:
    """What a command line with `-m` asks for, and `hydra.sweeper.params` of its experiment.

    Raises:
        UsageError: an override that cannot be read, or has no place in a sweep; nothing is swept.
        ConfigError: an unknown key or group file, `_target_`.
    """
    root = Path(config_dir).resolve()
    own = [text for text in overrides if not re.match(r"\+*hydra[./@]", text)]
    hydra = [_hydra_override(text) for text in overrides if text not in own]
    texts = _by_key([checked_override(text, root, cls, multirun=True) for text in own])
    try:
        with initialize_config_dir(str(root), version_base="1.3"):
            master = GlobalHydra.instance().hydra.compose_config(  # type: ignore[union-attr]
                job, [*texts.values(), *hydra], RunMode.MULTIRUN, with_log_configuration=False
            )
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"conf: {' '.join(str(error).split())}") from error
    sweeper = OmegaConf.select(master, "hydra.runtime.choices")["hydra/sweeper"]
    params = OmegaConf.select(master, "hydra.sweeper.params") or {}
    lines = [f"{key}={value}" for key, value in params.items()]
    texts = _by_key(checked_override(x, root, cls, multirun=True) for x in lines) | texts
    parser = OverridesParser.create()
    swept = {k: t for k, t in texts.items() if parser.parse_override(t).is_sweep_override()}
    for key in texts:
        if key in ("run_dir", "resume"):
            raise UsageError(f"{key}: every point has a run directory of its own; see sweep.dir")
    for key in swept:
        if key.partition(".")[0] in ("launch", "sweep"):
            raise UsageError(f"{key} cannot be swept: it is of the sweep as a whole")
    if not swept:
        raise UsageError("-m, but no key has several values, as in sampling.temperature=0,0.7")
    fixed = tuple(text for key, text in texts.items() if key not in swept)
    return Space(fixed, swept, sweeper)


def _by_key(texts: Iterable[str]) -> dict[str, str]:
    """Key -> override; of one key the last counts."""
    return {text.partition("=")[0].lstrip("+"): text for text in texts}


def _hydra_override(text: str) -> str:
    key, _, value = text.lstrip("+").partition("=")
    if key == "hydra/sweeper":
        if value not in SWEEPERS:
            raise ConfigError(f"hydra/sweeper={value}: expected one of {', '.join(SWEEPERS)}")
        return f"{key}={value}"
    if key in _ELSEWHERE:
        raise UsageError(f"{key} is not read here: give {_ELSEWHERE[key]}=…")
    raise UsageError(f"{key}: of Hydra's own settings a sweep has only hydra/sweeper")


def _first(override: Override) -> str:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    texts = list(override.sweep_string_iterator())
    if not texts:
        raise UsageError(f"override {override.input_line!a} has no value")
    return f"{override.get_key_element()}={texts[0]}"
