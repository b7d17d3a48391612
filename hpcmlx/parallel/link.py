"""The wires between pipeline stages: activations downstream, sampled tokens back to everyone.

Arrays are evaluated first, then sent by MPI: nothing waits for another host inside a GPU command
buffer, and no message size can deadlock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from hpcmlx.comm import Pending, evaluate
from hpcmlx.mesh import Mesh
from hpcmlx.parallel.pipeline import Stage

_MAX_DIMS = 8  # of an array whose shape is told, not known
_TOKENS_TAG = 30_000  # above the leaves' tags, below MPI's guaranteed 32767


class StageLink:
    """This rank's stage and its connections to its pipeline neighbours (same tensor rank).

    Attributes:
        seconds_waiting: how long this rank has waited for what other stages had to send.
        last_wait: how much of that in the last `forward`.
    """

    def __init__(self, mesh: Mesh, stage: Stage):
        self.mesh, self.stage = mesh, stage
        self.seconds_waiting = self.last_wait = 0.0
        self._sends: list[Pending] = []

    def forward(self, tokens: mx.array, caches: list[Any] | None = None) -> mx.array | None:
        """Run tokens [batch, length] through this stage: take what the stage before sends, and on
        all stages but the last evaluate and pass on.

        Returns:
            On the last stage the logits [batch, length, local vocab], unevaluated; else None.
        """
        before = self.seconds_waiting
        inputs = [] if self.stage.first else self.receive(*tokens.shape)
        self.last_wait = self.seconds_waiting - before
        outputs = self.stage(tokens, inputs, caches)
        if self.stage.last:
            return outputs
        evaluate(outputs, [cache.state for cache in caches or []])
        self.send(outputs)
        return None

    def receive(self, batch: int, length: int) -> list[mx.array]:
        """The arrays that this stage takes from the one before, for tokens [batch, length]."""
        source = self.mesh.replica_rank(self.mesh.pp - 1, self.mesh.tp)
        pending = []
        for tag, leaf in enumerate(self.stage.receives):
            shape = leaf.shape(batch, length)
            if not leaf.fixed:  # grows with the cache: its sender tells
                told = self.mesh.replica.irecv((_MAX_DIMS,), mx.int32, source, tag)
                shape = tuple(n for n in self.wait(told).tolist() if n >= 0)
            pending.append(self.mesh.replica.irecv(shape, leaf.dtype, source, tag))
        return [self.wait(p) for p in pending]

    def wait(self, pending: Pending) -> mx.array:
        """What arrives, and the time that takes counted as waiting."""
        begin = time.perf_counter()
        array = pending.wait()
        self.seconds_waiting += time.perf_counter() - begin
        return array

    def send(self, arrays: Sequence[mx.array]) -> None:
        """Pass evaluated arrays to the next stage; returns at once."""
        target = self.mesh.replica_rank(self.mesh.pp + 1, self.mesh.tp)
        for tag, (leaf, array) in enumerate(zip(self.stage.sends, arrays, strict=True)):
            if not leaf.fixed:
                unused = [-1] * (_MAX_DIMS - array.ndim)
                shape = mx.array([*array.shape, *unused], mx.int32)
                self._keep(self.mesh.replica.isend(shape, target, tag))
            self._keep(self.mesh.replica.isend(array, target, tag))

    def send_tokens(self, tokens: mx.array) -> None:
        """From the last stage: sampled tokens [rows] int32 to every earlier stage."""
        if self.mesh.dims.pp > 1:
            evaluate(tokens)  # waits for the tensor-parallel group: seen here, not inside isend
        for pp in range(self.mesh.dims.pp - 1):
            target = self.mesh.replica_rank(pp, self.mesh.tp)
            self._keep(self.mesh.replica.isend(tokens, target, _TOKENS_TAG))

    def receive_tokens(self, rows: int) -> Pending:
        """On the earlier stages: the tokens that the last stage will sample."""
        source = self.mesh.replica_rank(self.mesh.dims.pp - 1, self.mesh.tp)
        return self.mesh.replica.irecv((rows,), mx.int32, source, _TOKENS_TAG)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for pending in self._sends:
            pending.wait()
        self._sends.clear()

    def _keep(self, pending: Pending) -> None:
        self._sends = [p for p in self._sends if not p.done()] + [pending]
