"""Hydra's side of a sweep: the launchers for `launch=mpirun` and `launch=slurm`, and the search.

Hydra takes plugins from a package `hydra_plugins` only. Instead of such a folder beside this
package, `register` tells Hydra of the classes here, under names in that package.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hpcmlx.errors import ConfigError
from hpcmlx.sweep import search

_PACKAGE = "hydra_plugins.hpcmlx"


class _Launcher(Launcher):
    """Hands the points of a batch to the sweep, which is the "task function" here: what Hydra calls
    a job, one call in this process, is a job of MPI's."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._sweep: Any = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        found = self._start(job_overrides)
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, value in zip(job_overrides, found, strict=True)
        ]

    def _start(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[float | None]:
        raise NotImplementedError


class MpirunLauncher(_Launcher):
    """Each point an mpirun, on this host or those of `launch.hostfile`."""

    __module__ = _PACKAGE

    def _start(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[float | None]:
        return self._sweep.launch(job_overrides, self._sweep.run_here)


class SlurmLauncher(_Launcher):
    """All points of a batch one array of Slurm's."""

    __module__ = _PACKAGE

    def _start(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[float | None]:
        return self._sweep.launch(job_overrides, self._sweep.run_on_slurm)


class OptunaSweeper(Sweeper):
    """`hydra/sweeper=optuna`: asks Optuna for the points (see `search.py`)."""

    __module__ = _PACKAGE

    def __init__(self, params: Any = None):
        """
        Args:
            params: as Hydra's own sweepers have it; it has been read already.
        """

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context
        self._sweep: Any = task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        launcher = self.launcher
        assert launcher is not None

        def run(batch: Sequence[Sequence[str]]) -> list[float | None]:
            return [done.return_value for done in launcher.launch(batch, 0)]

        search.run(arguments, self._sweep.record, self._sweep.search, run)


def register() -> None:
    """Make the plugins known to Hydra, once for this process."""
    plugins, store = Plugins.instance(), ConfigStore.instance()  # which first looks for packages
    try:
        package = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    sys.modules[_PACKAGE] = package.hpcmlx = sys.modules[__name__]  # type: ignore[attr-defined]
    for group, name, plugin in (
        ("launcher", "mpirun", MpirunLauncher),
        ("launcher", "slurm", SlurmLauncher),
        ("sweeper", "optuna", OptunaSweeper),
    ):
        plugins.register(plugin)
        node = {"_target_": f"{_PACKAGE}.{plugin.__name__}"}
        if group == "sweeper":
            node |= {"params": None}  # type: ignore[dict-item]
        store.store(group=f"hydra/{group}", name=name, node=node, provider="hpcmlx")


@contextmanager
def set_aside() -> Iterator[None]:
    """Leave Hydra's one global state to somebody else, inside a sweep that Hydra drives."""
    ours = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = ours


def check_targets(config: DictConfig) -> None:
    """Refuse code that a file of conf/ names in Hydra's own settings, where Hydra would call it.

    Raises:
        ConfigError: a `_target_` that is not one of the sweepers and launchers.
    """
    known = {"hydra._internal.core_plugins.basic_sweeper.BasicSweeper"}
    known |= {f"{_PACKAGE}.{c.__name__}" for c in (MpirunLauncher, SlurmLauncher, OptunaSweeper)}
    plain = OmegaConf.to_container(config.hydra, resolve=False)
    for key, value in _targets(plain, "hydra"):
        if key not in ("hydra.sweeper", "hydra.launcher") or value not in known:
            raise ConfigError(
                f"{key}._target_={value}: a configuration is data and cannot name code; remove it"
            )


def _targets(node: Any, key: str) -> list[tuple[str, Any]]:
    found = []
    if isinstance(node, dict):
        found += [(key, node["_target_"])] if "_target_" in node else []
        for name, value in node.items():
            found += _targets(value, f"{key}.{name}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            found += _targets(value, f"{key}[{i}]")
    return found
