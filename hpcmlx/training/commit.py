"""One host's directory of checkpoints: what is in it, and how a checkpoint comes and goes.

    step-00000040.tmp/     being written, or given up: nobody reads it
    step-00000040/         committed: shard-00000.h5 …, manifest.json
    step-00000020.del/     being deleted, on every host: as good as gone

A checkpoint is one where its directory has its final name. On several hosts the manifest is on all
of them before any of them renames, so where one has renamed, the others may still do it after a
crash. Nothing here knows of other ranks; `checkpoint.py` calls it on one rank of each directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.files import _flush_directory, reported, write_atomic
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.pieces import Tensor, check_whole
from hpcmlx.training.shards import DTYPES

MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})(\.tmp|\.del)?")
_SHARD = re.compile(r"shard-(\d{5,})\.h5")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: What to do about a damaged checkpoint.
RESTORE = (
    "restore it from a copy; or delete it where another host has it; or go on from an older "
    "checkpoint with skip_damaged"
)


def shard_name(rank: int) -> str:
    return f"shard-{rank:05}.h5"


@dataclass(frozen=True)
class Shard:
    """What a rank has written.

    Attributes:
        sha256: of the file.
        bytes: in the file.
        host: where it was written.
    """

    sha256: str
    bytes: int
    host: str


@dataclass(frozen=True)
class Manifest:
    """All there is to know of a checkpoint but the numbers; the same on every host.

    Attributes:
        step: it was saved after.
        metric: at that step; lower is better.
        state: whatever the job wants back.
        versions: of what wrote it.
        shards: by rank.
        tensors: by name; their parts are by rank, too.
    """

    step: int
    metric: float | None
    state: Mapping[str, Any]
    versions: Mapping[str, str]
    shards: Mapping[int, Shard]
    tensors: Mapping[str, Tensor]

    def encode(self) -> bytes:
        """JSON whose first line has the SHA-256 of all that follows it."""
        content = {
            "format": _FORMAT,
            "step": self.step,
            "metric": self.metric,
            "state": self.state,
            "versions": self.versions,
            "shards": {
                shard_name(rank): vars(shard) for rank, shard in sorted(self.shards.items())
            },
            "tensors": {name: _to_json(tensor) for name, tensor in self.tensors.items()},
        }
        body = f'"checkpoint": {json.dumps(content, ensure_ascii=False)}}}\n'
        data = body.encode("utf-8", "surrogatepass")
        return _seal(data) + data


def decode(path: Path, data: bytes) -> Manifest:
    """The manifest that `Manifest.encode` made; `path` is for the message.

    Raises:
        IntegrityError: a byte of it has changed, or another version of hpcmlx wrote it.
    """
    first, _, rest = data.partition(b"\n")
    if first + b"\n" != _seal(rest):
        raise IntegrityError(f"{path} is damaged; {RESTORE}")
    content = json.loads(data.decode("utf-8", "surrogatepass"))["checkpoint"]
    if content.pop("format") != _FORMAT:
        raise IntegrityError(f"{path} is of another version of hpcmlx: {content['versions']}")
    shards = {_rank(name): Shard(**shard) for name, shard in content.pop("shards").items()}
    tensors = {name: _from_json(tensor) for name, tensor in content.pop("tensors").items()}
    for name, tensor in tensors.items():
        check_whole(name, tensor)
    return Manifest(**content, shards=shards, tensors=tensors)


def _seal(data: bytes) -> bytes:
    return f'{{"sha256": "{sha256(data).hexdigest()}",\n'.encode()


def _to_json(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "parts": [
            {"shard": shard_name(rank), "axis": cut.axis, "intervals": cut.intervals}
            for rank, cut in tensor.parts.items()
        ],
    }


def _from_json(values: dict[str, Any]) -> Tensor:
    parts = {
        _rank(part["shard"]): Cut(part["axis"], tuple(map(tuple, part["intervals"])))
        for part in values["parts"]
    }
    if values["dtype"] not in DTYPES:
        raise IntegrityError(f"dtype {values['dtype']} of another version of hpcmlx")
    return Tensor(tuple(values["shape"]), values["dtype"], parts)


def _rank(name: str) -> int:
    match = _SHARD.fullmatch(name)
    if match is None:  # it becomes a path
        raise IntegrityError(f"{name!a} is no name of a shard")
    return int(match[1])


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
            _flush_directory(self.directory)


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
