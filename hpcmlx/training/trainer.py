"""The training loop's own steps: one update, an evaluation, answers, a save, and going on again.

`finetune.py` drives it. Every method is called by all ranks together.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hpcmlx import comm, faults
from hpcmlx.errors import IntegrityError
from hpcmlx.flight import recorder
from hpcmlx.mesh import Mesh
from hpcmlx.observe.stragglers import Pace, Probe
from hpcmlx.parallel.schedule import Action, schedule
from hpcmlx.training.checkpoints.found import Found
from hpcmlx.training.checkpoints.pieces import Piece
from hpcmlx.training.data.batches import Batches, collate
from hpcmlx.training.data.dataset import Dataset
from hpcmlx.training.executor import Executor
from hpcmlx.training.optim import Optimizer, clip_scale
from hpcmlx.training.reduce import GradientSum, own_square_sum
from hpcmlx.training.stages import Stages
from hpcmlx.training.zero import Zero1


@dataclass(frozen=True)
class StepResult:
    """What one update did, the same on every rank.

    Attributes:
        loss: mean of -log p over the targets of the global batch.
        grad_norm: before clipping.
        skipped: a loss or gradient was not finite, and nothing was changed.
        asked_to_stop: some rank was, before or during the step.
        num_tokens: of the examples, padding left out.
        idle: share of the time that ranks waited for each other, their mean.
    """

    loss: float
    grad_norm: float
    skipped: bool
    asked_to_stop: bool
    num_tokens: int
    seconds: float
    idle: float


class Trainer:
    """This rank's part of a training run."""

    def __init__(
        self,
        mesh: Mesh,
        stages: Stages,
        executor: Executor,
        gradient_sum: GradientSum,
        optimizer: Optimizer | Zero1,
        *,
        schedule: str,
        clip_norm: float | None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            asked_to_stop: whether this rank was asked to; looked at once in every step.
        """
        self.mesh, self.stages = mesh, stages
        self._executor, self._sum, self._optimizer = executor, gradient_sum, optimizer
        self._schedule, self._clip = schedule, clip_norm
        self._asked_to_stop = asked_to_stop
        optimizer.init(stages.parameters())
        self._probe = Probe(mesh.dims.tp > 1)
        self._num_steps, self._seconds, self._idle, self._evaluating = 0, 0.0, 0.0, 0.0

    @property
    def pace(self) -> Pace:
        """What this rank's time went into, over all steps."""
        group, probe = self.mesh.world.rank // self.mesh.dims.tp, self._probe.seconds
        return Pace(group, self._seconds, self._idle, self._evaluating, probe, self._num_steps)

    # -- steps --

    def step(self, n: int, batches: Batches, dataset: Dataset) -> StepResult:
        """Update number `n`."""
        self._probe.look()
        begin, waited, evaluated = time.perf_counter(), self._waited, recorder.evaluating
        recorder.step = n + 1
        faults.strike(self.mesh.world.rank, n + 1)
        plan = batches.step(n)
        mine = [collate(dataset, rows) for rows in plan.microbatches[self.mesh.dp]]
        scale = 1 / plan.num_targets
        loss = self._executor.run(self._actions(len(mine)), mine, scale, self._sum.add)
        gradients = self._sum.finish()
        if faults.strikes(self.mesh.world.rank, n + 1, "nan"):
            gradients = {name: g * mx.nan for name, g in gradients.items()}
        agreed = time.perf_counter()
        norm, loss, stop, idle = self._agree(gradients, loss, waited)
        agreeing = time.perf_counter() - agreed
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self._update(n, gradients, norm)
        if faults.strikes(self.mesh.world.rank, n + 1, "flip"):
            self._flip_a_bit()
        seconds = time.perf_counter() - begin
        self._num_steps, self._seconds = self._num_steps + 1, self._seconds + seconds
        self._idle += self._waited - waited + agreeing
        self._evaluating += recorder.evaluating - evaluated
        num_tokens = int(dataset.lengths[list(plan.ids)].sum())
        return StepResult(
            loss * scale, norm, not finite, stop > 0, num_tokens, seconds, idle / seconds
        )

    def _update(self, n: int, gradients: Mapping[str, mx.array], norm: float) -> None:
        if self._clip is not None and (factor := clip_scale(norm, self._clip)) != 1:
            gradients = {name: g * factor for name, g in gradients.items()}
        parameters = self._optimizer.update(self.stages.parameters(), dict(gradients), n)
        comm.evaluate(parameters, self._optimizer.state)
        self.stages.set_parameters(parameters)

    def _agree(
        self, gradients: Mapping[str, mx.array], loss: float, waited: float
    ) -> tuple[float, float, float, float]:
        """(norm, summed loss, ranks that were asked to stop, mean seconds of waiting), in one
        message. After the sums all replicas have the same gradients: the first one's are in the
        norm, of the others only what is no number."""
        mesh = self.mesh
        squares = own_square_sum(gradients, self.stages.places) * (mesh.dp == 0)
        own_loss = loss if mesh.is_last_stage and mesh.tp == 0 else 0.0
        idle = self._waited - waited
        found = mesh.world.sum_numbers([squares, own_loss, float(self._asked_to_stop()), idle])
        return math.sqrt(found[0]), found[1], found[2], found[3] / mesh.world.size

    def _actions(self, num_microbatches: int) -> list[Action]:
        pp, chunks = self.mesh.dims.pp, len(self.stages.chunks)
        return schedule(self._schedule, pp, num_microbatches, chunks)[self.mesh.pp]

    @property
    def _waited(self) -> float:
        return self._executor.seconds_waiting + self._sum.seconds_waiting

    def learning_rate(self, n: int) -> float:
        """Of update number `n`."""
        return self._optimizer.learning_rate(n)

    # -- evaluation --

    def evaluate(self, batches: Batches, dataset: Dataset) -> float:
        """Mean of -log p over all targets of a dataset, the same on every rank."""
        mesh = self.mesh
        total, num_targets = 0.0, 0
        for n in range(batches.num_steps):
            plan = batches.step(n)
            mine = [collate(dataset, rows) for rows in plan.microbatches[mesh.dp]]
            total += self._executor.evaluate(mine)
            num_targets += plan.num_targets
        own = total if mesh.is_last_stage and mesh.tp == 0 else 0.0
        return mesh.world.sum_numbers([own])[0] / num_targets

    # -- copies --

    def check_replicas(self) -> None:
        """Compare the trained parameters of the replicas, bit for bit.

        Raises:
            IntegrityError: on all ranks; names those that differ from the others.
        """
        group = self.mesh.dp_group
        if group.size == 1:
            return
        digest = hashlib.sha256()
        for _, array in sorted(self.stages.parameters().items()):
            digest.update(_bytes(array))
        mine = (digest.digest(), self.mesh.world.rank, comm.hostname())
        everyone = group.allgather(mine)
        digests = [d for d, _, _ in everyone]
        common = max(digests, key=digests.count)
        odd = [f"rank {rank} on {host}" for d, rank, host in everyone if d != common]
        found = sorted(set().union(*self.mesh.world.allgather(set(odd))))
        if found:
            pair = " or the rank that it mirrors" if len(everyone) == 2 else ""
            raise IntegrityError(
                f"parameters of {', '.join(found)}{pair} differ from those of the other replicas: "
                "a bit has flipped there or a sum went wrong; resume from the last checkpoint and "
                "test that host's memory"
            )

    def _flip_a_bit(self) -> None:
        name, array = min(self.stages.parameters().items())
        bits = array.view(mx.uint32).reshape(-1)
        bits[0] = bits[0] ^ 1
        flipped = bits.reshape(array.shape).view(array.dtype)
        self.stages.set_parameters(self.stages.parameters() | {name: flipped})

    # -- checkpoints --

    def pieces(self) -> dict[str, Piece]:
        """What this rank adds to a checkpoint: of every trained parameter and all of the
        optimizer's state each position is some one rank's."""
        found: dict[str, Piece] = {}
        parameters = self.stages.parameters()
        cuts = {name: place.cut for name, place in self.stages.places.items()}
        for name, place in self.stages.places.items():
            if self.mesh.dp == 0 and not place.owns_nothing:
                found[f"param/{name}"] = Piece(
                    place.own(parameters[name]), place.shape, place.owned or place.cut
                )
        spread = isinstance(self._optimizer, Zero1)
        for key, array in self._optimizer.state.items():
            name = key.rpartition("/")[0]
            place = self.stages.places[name]
            # With ZeRO-1 only the replica that owns it has it.
            if (self.mesh.dp and not spread) or not place.first:
                continue
            if self._optimizer.state_cut(key, cuts) is not None:
                if not place.owns_nothing:
                    cut = place.owned or place.cut
                    found[f"optim/{key}"] = Piece(place.own(array), place.shape, cut)
            elif self.mesh.tp == 0:
                found[f"optim/{key}"] = Piece(array, array.shape, None)
        return found

    def restore(self, found: Found) -> None:
        """Go on from a checkpoint, whatever layout saved it.

        Raises:
            IntegrityError: it lacks something, or holds something of another shape.
        """
        places = self.stages.places
        cuts = {name: place.cut for name, place in places.items()}
        new = {name: found.read(f"param/{name}", place.cut) for name, place in places.items()}
        for name, old in self.stages.parameters().items():
            if (new[name].shape, new[name].dtype) != (old.shape, old.dtype):
                raise IntegrityError(
                    f"stored {name} is {new[name].dtype} {list(new[name].shape)} on this rank, "
                    f"expected {old.dtype} {list(old.shape)}"
                )
        self.stages.set_parameters(new)
        self._optimizer.restore(
            {
                key: found.read(f"optim/{key}", self._optimizer.state_cut(key, cuts))
                for key in self._optimizer.state
            }
        )


def _bytes(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array).tobytes()
