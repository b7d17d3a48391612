"""The points of a sweep: their names, what `sweep.yaml` keeps of them, which are missing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from hpcmlx.errors import ConfigError, ExitCode, IntegrityError
from hpcmlx.files import write_atomic
from hpcmlx.record import completion

#: In a sweep's directory: its points, and how each has ended last.
SWEEP = "sweep.yaml"
_LONGEST = 100  # characters of a name; it also has to fit the endings of files


@dataclass
class Point:
    """One point, as it is kept in `sweep.yaml`.

    Attributes:
        name: of its run directory, and of its files beside that.
        overrides: key -> value of what is swept, as text.
        config_hash: of its whole configuration, but for what the sweep itself sets.
        exit_code: of its last launch; None before there was one that has ended.
        seconds: that this launch has taken.
        reason: why it has failed.
    """

    name: str
    overrides: dict[str, str]
    config_hash: str
    exit_code: int | None = None
    seconds: float | None = None
    reason: str = ""


@dataclass
class Sweep:
    """A sweep's directory.

    Attributes:
        path: of the directory; not kept in the file.
        job: name of the job.
        metric: number of summary.json that is shown.
        direction: "minimize" or "maximize".
        keys: what is swept.
        points: in the order in which they were asked for.
        array: id of the last array job.
        tasks: name of the point of each of its tasks.
    """

    path: Path
    job: str
    metric: str
    direction: str
    keys: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    array: str | None = None
    tasks: list[str] = field(default_factory=list)

    def run_dir(self, point: Point) -> Path:
        return self.path / point.name

    def file(self, point: Point, ending: str) -> Path:
        """A file beside the run directory: `yaml`, `log` or `hosts`."""
        return self.path / f"{point.name}.{ending}"

    def find(self, overrides: Mapping[str, str]) -> Point | None:
        return next((p for p in self.points if p.overrides == overrides), None)

    def add(self, overrides: Mapping[str, str], config_hash: str) -> Point:
        """The point with these values: the one that is there, or a new one.

        Raises:
            ConfigError: what is not swept was different when it was begun.
        """
        point = self.find(overrides)
        if point is not None:
            if point.config_hash != config_hash and self.run_dir(point).exists():
                raise ConfigError(
                    f"{self.path} was begun with other settings than these ({point.name} differs "
                    "in something that is not swept): set it back, or give another sweep.dir"
                )
            point.config_hash = config_hash
            return point
        name = point_name(overrides)
        if name.casefold() in {p.name.casefold() for p in self.points}:
            name = _with_hash(name, overrides)
        point = Point(name, dict(overrides), config_hash)
        self.points.append(point)
        return point

    def save(self) -> None:
        """
        Raises:
            OutputError, StorageError: it cannot be written.
        """
        values = asdict(self)
        del values["path"]
        write_atomic(self.path / SWEEP, yaml.safe_dump(values, sort_keys=False))


def load_sweep(path: Path) -> Sweep:
    """The sweep in a directory.

    Raises:
        ConfigError: there is none.
        IntegrityError: its file is damaged.
    """
    try:
        values = yaml.safe_load((path / SWEEP).read_text())
        points = [Point(**values) for values in values.pop("points")]
        return Sweep(path=path, points=points, **values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path} is not a sweep: it has no {SWEEP}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise IntegrityError(f"{path / SWEEP} cannot be read: {reason}") from error


def point_name(overrides: Mapping[str, str]) -> str:
    """A name for files and directories: `temperature=0.7__pp=2`. No commas, which mpirun takes for
    the end of a host file's name.

    Of a key its last word, where no other key has the same. What could not stand in a file's name
    is replaced; then, and where the name is too long, a hash tells it from its like.
    """
    last = [key.rpartition(".")[2] for key in overrides]
    parts, lossy = [], False
    for key, value in overrides.items():
        short = key.rpartition(".")[2]
        plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", value.strip("'\"")).strip("-")
        lossy = lossy or plain != value
        parts.append(f"{short if last.count(short) == 1 else key}={plain}")
    name = "__".join(parts)
    return _with_hash(name, overrides) if lossy or len(name) > _LONGEST else name


def _with_hash(name: str, overrides: Mapping[str, str]) -> str:
    text = json.dumps(dict(overrides), sort_keys=True)
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def missing(sweep: Sweep, points: Sequence[Point]) -> list[Point]:
    """Those without a completion record."""
    return [point for point in points if completion(sweep.run_dir(point)) is None]


def put_aside(run_dir: Path) -> None:
    """Give what an earlier launch has left another name, for a job that begins anew."""
    if run_dir.exists() and any(run_dir.iterdir()):
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.attempt{number}")).exists():
            number += 1
        run_dir.rename(aside)


def state(sweep: Sweep, point: Point) -> str:
    """How it stands with a point, in a word or two."""
    record = completion(sweep.run_dir(point))
    if record is not None:
        return "complete" if record["exit_code"] == 0 else "complete, rows with errors"
    if point.exit_code is None:
        return "not complete" if sweep.run_dir(point).exists() else "not run"
    return "stopped, saved" if point.exit_code == ExitCode.PREEMPTED else "FAILED"


def exit_code(sweep: Sweep, points: Sequence[Point]) -> ExitCode:
    """Of a sweep: 0 where every point is complete and well, 64 where some have failed, or rows of
    them, 76 where the others have only to go on."""
    codes = {state(sweep, point) for point in points}
    if codes == {"complete"}:
        return ExitCode.OK
    if codes & {"FAILED", "complete, rows with errors"}:
        return ExitCode.ROW_ERRORS
    return ExitCode.PREEMPTED


def metric(run_dir: Path, name: str) -> float | None:
    """A number of a run's summary.json, by its dotted name; None where it is not there."""
    try:
        value = json.loads((run_dir / "summary.json").read_text())
        for key in name.split("."):
            value = value[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None
