"""Checkpoints that every rank writes a part of and that ranks of any layout read.

A save costs the step that it is called in a table of names; the writing is done by a thread, and
`poll`, called at every step boundary, makes it count once all ranks have written. There is no need
for a shared file system: `find` brings what a host lacks from those that have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from hpcmlx.agree import agree, share_failure
from hpcmlx.comm import Communicator
from hpcmlx.errors import HpcmlxError, IntegrityError, OutputError, StorageError
from hpcmlx.training.checkpoints.commit import Mark, StepStore, by_metric, superfluous
from hpcmlx.training.checkpoints.found import Found
from hpcmlx.training.checkpoints.hosts import Places
from hpcmlx.training.checkpoints.manifest import Manifest, Shard, shard_name
from hpcmlx.training.checkpoints.pieces import Piece, Tensor, describe, tabulate
from hpcmlx.training.checkpoints.recovery import complete, tidy
from hpcmlx.training.checkpoints.shards import Snapshot, take, write_shard


class CheckpointStore:
    """The checkpoints of one run. All methods are collective over `world`, and what one rank
    raises all ranks raise.

    A store goes on from what it has found last: once a later step is committed, checkpoints of
    steps after the one that was found belong to a history that has been left, and are deleted.
    One launch at a time works in a directory; the lock of its run directory sees to that.
    """

    def __init__(
        self, directory: str | Path, world: Communicator, keep_last: int = 2, keep_best: int = 1
    ):
        """
        Args:
            directory: of the checkpoints, on this rank's host; made where it is missing.
            keep_last: how many of the newest to keep. The two newest that are known to be whole
                stay in any case.
            keep_best: how many of those with the lowest metric to keep.

        Raises:
            OutputError, StorageError: it cannot be made or written into.
        """
        self._world, self._keep = world, (keep_last, keep_best)
        self._steps = StepStore(Path(directory).absolute())
        self._places = Places(self._steps.directory, world)
        self._metrics: dict[int, float | None] | None = None  # of what is committed; not looked yet
        self._whole: set[int] = set()  # written or found here
        self._base: int | None = None  # the newest of these
        self._pending: _Save | None = None

    def save(
        self,
        step: int,
        pieces: Mapping[str, Piece],
        state: Mapping[str, Any],
        metric: float | None = None,
    ) -> None:
        """Begin to save; returns while a thread writes. Waits for an earlier save. A step that has
        been saved or found already is not written again.

        Args:
            step: not before any that was saved or found.
            pieces: what this rank adds, by the tensor's global name. All ranks together pass every
                position of every tensor once (`pieces.without_copies` drops replicas). The arrays
                stay in memory until they are written.
            state: anything that JSON can say; the same on all ranks.
            metric: lower is better.

        Raises:
            IntegrityError: a position of a tensor is passed by no rank or twice, or the state is
                not the same on all ranks.
            OutputError: the directory has checkpoints that this run does not go on from.
            StorageError: the earlier save has failed, or this one cannot begin.
        """
        self.poll(wait=True)
        if self._metrics is None:
            self._tidy()
        if step == self._base:
            return
        if self._base is None and self._metrics:
            raise OutputError(
                f"{self._steps.directory} has checkpoints of another run, step "
                f"{max(self._metrics)} for one; resume it or give another run_dir"
            )
        if self._base is not None and step < self._base:
            raise ValueError(f"step {step} comes before step {self._base}, which is saved")
        text = json.dumps([metric, state], sort_keys=True)
        snapshots = agree(self._world, lambda: take(pieces))
        held = {name: describe(piece) for name, piece in pieces.items()}
        versions = {name: version(name) for name in ("hpcmlx", "mlx", "h5py")}
        said = self._world.allgather((held, sha256(text.encode()).digest(), versions))
        for rank, (_, digest, _) in enumerate(said):
            if digest != said[0][1]:
                raise IntegrityError(
                    f"the state to be saved at step {step} is not the same on rank {rank} (on "
                    f"{self._places.hosts[rank]}) and on rank 0"
                )
        tensors = tabulate([tensors for tensors, _, _ in said])
        self._places.lead(lambda: self._steps.begin(step))
        path = self._steps.path(step, ".tmp") / shard_name(self._world.rank)
        self._pending = _Save(step, text, tensors, said[0][2], path, snapshots)

    def poll(self, wait: bool = False) -> int | None:
        """Commit the save under way if all ranks have written their shards; to be called at every
        step boundary, and with `wait` before the end.

        Returns:
            The step that is committed now; None where nothing was pending or it is not done.

        Raises:
            StorageError: a rank could not write; nothing of this save stays, earlier checkpoints
                do. Or committing, or deleting old ones, has failed.
        """
        save = self._pending
        if save is None:
            return None
        if wait:
            save.wait()
        if not all(self._world.allgather(save.done())):
            return None
        self._pending = None
        try:
            share_failure(self._world, save.failure)
            shards = {}
            for rank, file in enumerate(self._world.allgather(save.written)):
                if file is not None:
                    shards[rank] = Shard(file[0], file[1], self._places.hosts[rank])
            manifest = save.manifest(shards)
            data = manifest.encode()
            self._places.lead(lambda: self._steps.prepare(save.step, data))
        except Exception:
            self._discard(save.step)
            raise
        self._commit(save.step, manifest.metric)
        return save.step

    def _commit(self, step: int, metric: float | None) -> None:
        assert self._metrics is not None
        self._delete({s for s in self._metrics if self._base is not None and s > self._base})
        # Where only some hosts get through this, the next launch takes the rest through it.
        self._places.lead(lambda: self._steps.publish(step))
        self._metrics[step] = metric
        self._whole.add(step)
        self._base = step
        self._delete(superfluous(self._metrics, self._whole, *self._keep))

    def _delete(self, steps: set[int]) -> None:
        assert self._metrics is not None
        if not steps:
            return
        self._places.lead(lambda: self._steps.condemn(steps))
        self._places.lead(lambda: self._steps.bury(steps))
        self._metrics = {s: metric for s, metric in self._metrics.items() if s not in steps}
        self._whole -= steps

    def _discard(self, step: int) -> None:
        """Remove what a failed save has left; if that fails too, the next launch does it."""
        try:
            self._places.lead(lambda: self._steps.discard(step))
        except HpcmlxError:
            return

    def find(
        self, step: int | Literal["best"] | None = None, *, skip_damaged: bool = False
    ) -> Found | None:
        """A checkpoint that is whole and now on every host. Removes what is left of saves that
        were cut off.

        Args:
            step: which; None for the newest, "best" for the one with the lowest metric.
            skip_damaged: take the next one where one is damaged.

        Returns:
            None where there is no such checkpoint.

        Raises:
            IntegrityError: one is damaged, or a shard of it is on no host; names host and file.
                With `skip_damaged` where no other is whole.
            StorageError: reading failed, or a host has no room for what it lacks.
        """
        self.poll(wait=True)
        marks = self._tidy()
        assert self._metrics is not None
        if step is None:
            candidates = sorted(self._metrics, reverse=True)
        elif step == "best":
            unknown = {s for at in marks for s, mark in at.items() if mark.problem}
            candidates = sorted(unknown) + by_metric(self._metrics)
        else:
            candidates = [step] if step in self._metrics else []
        skipped: list[str] = []
        for candidate in candidates:
            try:
                manifest = complete(
                    self._places, self._steps, candidate, [at.get(candidate) for at in marks]
                )
            except IntegrityError as error:
                if not skip_damaged:
                    raise
                skipped.append(str(error))
                continue
            self._base = candidate
            self._whole = {s for s in self._whole if s < candidate} | {candidate}
            return Found(self._steps.path(candidate), manifest, tuple(skipped))
        if skipped:
            raise IntegrityError(f"no checkpoint is whole: {'; '.join(skipped)}")
        return None

    def _tidy(self) -> list[dict[int, Mark]]:
        marks = tidy(self._places, self._steps)
        self._metrics = {}
        for step, mark in (item for at in marks for item in at.items()):
            if self._metrics.get(step) is None:
                self._metrics[step] = mark.metric
        return marks


class _Save:
    """A save under way, on one rank: what is to be committed, and the thread that writes.

    Attributes:
        written: SHA-256 and bytes of this rank's shard; None without one, or if writing failed.
        failure: why it failed.
    """

    def __init__(
        self,
        step: int,
        text: str,
        tensors: Mapping[str, Tensor],
        versions: Mapping[str, str],
        path: Path,
        snapshots: Mapping[str, Snapshot],
    ):
        self.step = step
        self._text, self._tensors, self._versions = text, tensors, versions
        self.written: tuple[str, int] | None = None
        self.failure: Exception | None = None
        self._thread = Thread(target=self._write, args=(path, snapshots), name="checkpoint")
        self._thread.start()

    def _write(self, path: Path, snapshots: Mapping[str, Snapshot]) -> None:
        if not snapshots:
            return
        try:
            self.written = write_shard(path, snapshots)
        except OutputError as error:  # a save was under way: not a run that cannot begin
            self.failure = StorageError(str(error))
        except Exception as error:
            self.failure = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def manifest(self, shards: Mapping[int, Shard]) -> Manifest:
        metric, state = json.loads(self._text)
        return Manifest(self.step, metric, state, self._versions, shards, self._tensors)
