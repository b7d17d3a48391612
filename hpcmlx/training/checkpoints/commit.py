"""One host's directory of checkpoints: what is in it, and how a checkpoint comes and goes.

    step-00000040.tmp/     being written, or given up: nobody reads it
    step-00000040/         committed: shard-00000.h5 …, manifest.json
    step-00000020.del/     being deleted, on every host: as good as gone

A checkpoint is one where its directory has its final name. On several hosts the manifest is on all
of them before any of them renames, so where one has renamed, the others may still do it after a
crash. Nothing here knows of other ranks; `checkpoint.py` calls it on one rank of each directory.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite
from pathlib import Path

from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.files import flush_directory, reported, write_atomic
from hpcmlx.training.checkpoints.manifest import MANIFEST, RESTORE, decode

_STEP = re.compile(r"step-(\d{8,})(\.tmp|\.del)?")


@dataclass(frozen=True)
class Mark:
    """A committed checkpoint, as far as its manifest says.

    Attributes:
        digest: SHA-256 of the manifest; "" where it is damaged or missing.
        metric: from it.
        problem: what is wrong with it.
    """

    digest: str
    metric: float | None = None
    problem: str = ""


@dataclass
class Listing:
    """What is in a directory.

    Attributes:
        committed: checkpoints by step.
        prepared: digest of the manifest by step, of directories that lack only their final name.
        unfinished: steps whose directory has no final name, prepared or not.
        dying: steps that are being deleted.
    """

    committed: dict[int, Mark] = field(default_factory=dict)
    prepared: dict[int, str] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)
    dying: set[int] = field(default_factory=set)


class StepStore:
    """The checkpoints in one directory. All methods raise StorageError where the disk fails."""

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, step: int, suffix: str = "") -> Path:
        """Suffixes: ".tmp" while it is written, ".del" while it is deleted."""
        return self.directory / f"step-{step:08}{suffix}"

    def scan(self) -> Listing:
        found = Listing()
        try:
            names = sorted(os.listdir(self.directory))
        except OSError as error:
            raise StorageError(f"reading {self.directory} failed: {error.strerror}") from error
        for name in names:
            match = _STEP.fullmatch(name)
            if match is None:
                continue
            step = int(match[1])
            if match[2] == ".del":
                found.dying.add(step)
            elif match[2] == ".tmp":
                found.unfinished.add(step)
                if digest := self._mark(self.path(step, ".tmp")).digest:
                    found.prepared[step] = digest
            else:
                found.committed[step] = self._mark(self.path(step))
        return found

    def _mark(self, folder: Path) -> Mark:
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
            manifest = decode(path, data)
        except FileNotFoundError:
            return Mark("", problem=f"{path} is missing; {RESTORE}")
        except OSError as error:
            raise StorageError(f"reading {path} failed: {error.strerror}") from error
        except IntegrityError as error:
            return Mark("", problem=str(error))
        if manifest.step != int(folder.name[5:].partition(".")[0]):
            return Mark("", problem=f"{path} is of step {manifest.step}; {RESTORE}")
        return Mark(sha256(data).hexdigest(), manifest.metric)

    def begin(self, step: int) -> None:
        """A new directory to write a checkpoint into."""
        self.discard(step)
        path = self.path(step, ".tmp")
        with reported(path):
            path.mkdir(mode=0o700)

    def discard(self, step: int) -> None:
        """Delete what was not committed."""
        _delete(self.path(step, ".tmp"))

    def prepare(self, step: int, manifest: bytes) -> None:
        """Write the manifest, last of all files."""
        write_atomic(self.path(step, ".tmp") / MANIFEST, manifest)

    def publish(self, step: int) -> None:
        """Give a prepared checkpoint its name."""
        self._rename(self.path(step, ".tmp"), self.path(step))

    def condemn(self, steps: Collection[int]) -> None:
        """First half of deleting: on every host before the second on any."""
        for step in steps:
            if self.path(step).exists():
                _delete(self.path(step, ".del"))
                self._rename(self.path(step), self.path(step, ".del"))

    def bury(self, steps: Collection[int]) -> None:
        """Second half of deleting."""
        for step in steps:
            _delete(self.path(step, ".del"))

    def _rename(self, old: Path, new: Path) -> None:
        with reported(new):
            os.rename(old, new)
            flush_directory(self.directory)


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"deleting {path} failed: {error.strerror}") from error


def superfluous(
    metrics: Mapping[int, float | None],
    verified: Collection[int],
    keep_last: int,
    keep_best: int,
) -> set[int]:
    """Which checkpoints to delete.

    Kept are the newest, the best, and at any rate the two newest of those that are known to be
    whole; where there are not two, everything.

    Args:
        metrics: of every committed checkpoint, by step; lower is better, None or NaN is none.
        verified: the steps that are known to be whole.
        keep_last: how many of the newest to keep.
        keep_best: how many of the best to keep.
    """
    whole = sorted(set(verified) & set(metrics))
    if len(whole) < 2:
        return set()
    newest = sorted(metrics)[-keep_last:] if keep_last else []
    best = by_metric(metrics)[:keep_best]
    return set(metrics) - set(newest) - set(best) - set(whole[-2:])


def by_metric(metrics: Mapping[int, float | None]) -> list[int]:
    """Steps that have a metric, the lowest first, of equal ones the newest."""
    rated = [(value, -step) for step, value in metrics.items() if value is not None]
    return [-step for _, step in sorted(pair for pair in rated if isfinite(pair[0]))]
