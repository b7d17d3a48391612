"""A sweep from its command line to its exit code: `jobs/NAME.py -m`.

Every point is composed and checked here, by the same rules as a single job, before any of a grid
starts; its whole configuration is written beside its run directory, and is what its ranks read.
The same command with the same `sweep.dir` runs what has no completion record.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from hpcmlx import config, redact
from hpcmlx.config import CommandLine, JobConfig, config_hash, to_yaml
from hpcmlx.errors import ConfigError, ExitCode, HpcmlxError, OutputError, UsageError
from hpcmlx.files import write_atomic
from hpcmlx.launch.hostfile import Host, parse_hostfile
from hpcmlx.launch.mpirun import find_mpirun, num_cores
from hpcmlx.record import completion
from hpcmlx.rundir import LOCK, lock_run_dir, make_run_dir, reserve_run_dir
from hpcmlx.sweep import array, local, plugins, search, table
from hpcmlx.sweep.point import words
from hpcmlx.sweep.points import (
    SWEEP,
    Point,
    Sweep,
    exit_code,
    load_sweep,
    missing,
    put_aside,
)
from hpcmlx.sweep.points import metric as metric_of
from hpcmlx.sweep.slots import Slots
from hpcmlx.sweep.space import Space, read_space

ROOT = "sweeps"  # where new sweeps go


class _Ended(Exception):
    """The sweep is to end early; nothing more of it is to be started."""


def run_sweep(
    job: str, script: str, cls: type[JobConfig], config_dir: Path, command: CommandLine
) -> int:
    """Run a sweep, or what is missing of it.

    Args:
        job: name of the job.
        script: the job's file (`sys.argv[0]`).
        cls: the job's dataclass.
        config_dir: the conf/ directory.

    Returns:
        0 where all points are complete; 64 where some have failed, or rows of them; 76 where some
        were stopped and saved; 128 + N after signal N.

    Raises:
        UsageError, ConfigError: the command line, or a point; of a grid nothing was started.
        OutputError, StorageError: the sweep's directory.
    """
    plugins.register()
    space = read_space(cls, config_dir, job, command.overrides)
    if space.sweeper == "optuna":
        search.require_optuna()
    first = config.compose(cls, config_dir, job, space.first())
    metric, direction = first.metric
    if space.sweeper == "optuna" and first.sweep.metric and not first.sweep.direction:
        raise UsageError("sweep.metric is searched for: give sweep.direction=minimize or maximize")
    if not Path(script).is_file():
        raise ConfigError(f"-m starts a script again, and {script!a} is not a file")
    path = Path(first.sweep.dir).absolute() if first.sweep.dir else None
    known = path is not None and (path / SWEEP).exists()
    if known:
        assert path is not None
        record = load_sweep(path)
        if (record.job, record.keys) != (job, list(space.swept)):
            raise OutputError(
                f"{path} is a sweep of {record.job} over {', '.join(record.keys)}; give another "
                "sweep.dir"
            )
    else:
        if path is not None and path.exists() and any(path.iterdir()):
            raise OutputError(f"sweep.dir={path} has something else in it; give another one")
        record = Sweep(path or Path(), job, metric, direction, list(space.swept))
    record.metric = first.sweep.metric or metric
    record.direction = first.sweep.direction or direction
    running = _Running(job, script, cls, config_dir, space, first, record)
    if command.show:
        return running.show()
    record.path = make_run_dir(path) if path else reserve_run_dir(job, "sweep", ROOT)
    lock_run_dir(record.path)
    return running.run()


class _Running:
    """One launch of a sweep; what Hydra's plugins call.

    Attributes:
        record: the sweep as it is kept.
        search: what is asked of a search.
    """

    def __init__(
        self,
        job: str,
        script: str,
        cls: type[JobConfig],
        config_dir: Path,
        space: Space,
        first: JobConfig,
        record: Sweep,
    ):
        self.record = record
        self._job, self._script, self._cls = job, script, cls
        self._config_dir, self._space, self._first = config_dir, space, first
        at_once = first.sweep.max_parallel or 1
        self.search = search.Search(first.sweep.trials, at_once, first.sweep.seed)
        self._settings: dict[str, JobConfig] = {}
        self._asked: list[Point] = []  # by this launch
        self._signal = 0
        self._secrets: dict[str, str] = {}
        self._showing = False
        launch = first.launch
        self._only_submits = launch.kind == "slurm" and not launch.slurm.follow
        if self._only_submits and space.sweeper == "optuna":
            raise UsageError("a search needs the results: leave launch.slurm.follow as it is")

    def __call__(self, cfg: object) -> None:
        """Hydra's task function, which a launcher would call for a point. Ours do not."""
        raise NotImplementedError

    def run(self) -> int:
        error: HpcmlxError | None = None
        try:
            self._sweep()
        except _Ended:
            pass
        except HpcmlxError as problem:
            if not self._asked:
                self._give_back()
                raise
            error = problem
        table.show(self.record, self._asked, sys.stdout)
        if error is not None:
            raise error
        if self._only_submits:
            return int(ExitCode.OK)
        if self._signal and self._signal != signal.SIGUSR1:
            return 128 + self._signal
        code = exit_code(self.record, self._asked)
        if code is not ExitCode.OK:
            self._say(f"not all points are complete; sweep.dir={self.record.path} runs the others")
        return int(code)

    def show(self) -> int:
        """Print the configuration of every point that would be run."""
        self._showing = True
        self._sweep()
        return int(ExitCode.OK)

    def _sweep(self) -> None:
        """Hydra: the sweeper makes points, the launcher hands them to `launch`."""
        kind = "slurm" if self._first.launch.kind == "slurm" else "mpirun"
        own = [f"hydra/sweeper={self._space.sweeper}", f"hydra/launcher={kind}"]
        own += ["hydra.sweeper.params=null"]  # they are among the overrides by now
        root = str(self._config_dir.resolve())
        # Hydra's sweeper leaves a file of its own, which says less than ours.
        with TemporaryDirectory() as unused, initialize_config_dir(root, version_base="1.3"):
            own.append(config.quote("hydra.sweep.dir", unused))
            overrides = [*self._space.overrides, *own]
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            how = {"with_log_configuration": False}
            plugins.check_targets(
                hydra.compose_config(self._job, overrides, RunMode.MULTIRUN, **how)
            )
            hydra.multirun(self._job, self, overrides, **how)

    def launch(
        self, batch: Sequence[Sequence[str]], runner: Callable[[Sequence[Point]], int]
    ) -> list[float | None]:
        """Run the points of a batch that are not complete.

        Args:
            runner: `run_here` or `run_on_slurm`.

        Returns:
            The metric of each; None where it is not complete.
        """
        points = self._points(batch)
        if self._showing:
            return [None for _ in points]
        self._asked += [p for p in points if p not in self._asked]
        # A search may ask for one point twice at once.
        left = missing(self.record, list({p.name: p for p in points}.values()))
        runnable = [p for p in left if p.name in self._settings]
        already = sum(p not in left for p in points)
        note = f", {already} of them complete" if already else ""
        self._say(f"{len(points)} points{note}; {self.record.path}")
        self.record.save()
        if runnable:
            self._signal = runner(runnable)
            self.record.save()
        if self._signal or self._only_submits:
            raise _Ended
        return [self._value(point) for point in points]

    def _points(self, batch: Sequence[Sequence[str]]) -> list[Point]:
        """Compose and check all points of a batch."""
        points = []
        for overrides in batch:
            values = self._space.values(overrides)
            try:
                with plugins.set_aside():
                    settings = config.compose(self._cls, self._config_dir, self._job, overrides)
                if settings.launch != self._first.launch or settings.sweep != self._first.sweep:
                    raise ConfigError("launch and sweep cannot differ from point to point")
            except HpcmlxError as error:
                text = " ".join(f"{key}={value}" for key, value in values.items())
                if self._space.sweeper == "basic":
                    raise ConfigError(f"point {text}: {error}; nothing was started") from error
                # A search may come upon what does not fit together: that point has failed.
                self._say(f"point {text} is refused: {error}")
                point = self.record.add(values, "")
                point.exit_code, point.reason = int(error.exit_code), str(error)
            else:
                self._secrets |= redact.secrets(config.to_dict(settings), settings.unresolved)
                redact.hide(self._secrets)
                point = self.record.add(values, config_hash(settings))
                self._settings[point.name] = settings
                if self._showing:
                    print(f"# {point.name}\n{to_yaml(settings)}---")
            points.append(point)
        return points

    def run_here(self, points: Sequence[Point]) -> int:
        """Each point an mpirun; the signal that ended it early, else 0."""
        find_mpirun()
        hostfile = self._first.launch.hostfile
        hosts = [Host("localhost", num_cores())]
        if hostfile is not None:
            hosts = parse_hostfile(hostfile)
        slots, tasks = Slots(hosts), {}
        for point in points:
            share = self.record.file(point, "hosts") if hostfile is not None else None
            path = self._write(point, str(share) if share else None)
            argv = [*words(self._job, self._script), str(path)]
            log = self.record.file(point, "log")
            task = local.Task(point.name, argv, self._num_ranks(point), log, share)
            tasks[point.name] = task
        by_name = {point.name: point for point in points}

        def started(task: local.Task) -> None:
            self._say(f"{task.name}: started; {task.log}")

        def done(task: local.Task, code: int, seconds: float) -> None:
            self._note(by_name[task.name], code, seconds)

        limit = self._first.sweep.max_parallel
        return local.run_tasks(list(tasks.values()), slots, limit, done, started)

    def run_on_slurm(self, points: Sequence[Point]) -> int:
        """All points an array; the signal that ended the following of it, else 0."""
        return array.run_array(
            self.record,
            points,
            self._script,
            max(map(self._num_ranks, points)),
            self._first,
            lambda point: self._write(point, None),
            self._note,
        )

    def _write(self, point: Point, hostfile: str | None) -> Path:
        """The configuration that the ranks of a point read."""
        run_dir = self.record.run_dir(point)
        settings = self._settings[point.name]
        if not settings.RESUMABLE:
            put_aside(run_dir)
        ours = ("run_dir", "launch", "sweep")
        launch = replace(settings.launch, kind="mpirun", hostfile=hostfile)
        if launch.hosts is None and hostfile is not None:
            beside = Path(f"{settings.launch.hostfile}.yaml")
            launch.hosts = str(beside) if beside.exists() else None
        settings = replace(
            settings,
            run_dir=str(run_dir),
            launch=launch,
            unresolved={
                key: text
                for key, text in settings.unresolved.items()
                if key.partition(".")[0] not in ours
            },
        )
        path = self.record.file(point, "yaml")
        write_atomic(path, to_yaml(settings))
        return path

    def _note(self, point: Point, code: int, seconds: float | None) -> None:
        """A point's launch has ended."""
        found = completion(self.record.run_dir(point))
        point.seconds = found["seconds"] if found else seconds
        point.exit_code = int(found["exit_code"]) if found else local.lost(code)
        point.reason = "" if found else local.reason(self.record.file(point, "log"))
        self.record.save()
        took = "" if point.seconds is None else f" after {point.seconds:.0f} s"
        if found:
            self._say(f"{point.name}: complete{took}")
        else:
            why = f": {point.reason}" if point.reason else ""
            self._say(f"{point.name}: not complete{took}, exit code {point.exit_code}{why}")

    def _value(self, point: Point) -> float | None:
        run_dir = self.record.run_dir(point)
        return metric_of(run_dir, self.record.metric) if completion(run_dir) else None

    def _num_ranks(self, point: Point) -> int:
        parallel = self._settings[point.name].parallel
        return parallel.dp * parallel.pp * parallel.tp

    def _give_back(self) -> None:
        """Leave nothing of a sweep that was refused where there was nothing before."""
        path = self.record.path
        if {file.name for file in path.iterdir()} == {LOCK}:
            (path / LOCK).unlink()
            path.rmdir()

    def _say(self, text: str) -> None:
        print(f"hpcmlx: {text}", file=sys.stderr, flush=True)
