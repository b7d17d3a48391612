"""Runs a schedule: every stage's forward and backward passes over the microbatches of a step.

A forward pass builds its backward pass along with it, lazily: `mx.vjp` is given a cotangent whose
memory is still empty, the outputs are evaluated and sent, and when the next stage's cotangent has
arrived in that memory, evaluating the gradients computes the backward pass and nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from hpcmlx.comm import Pending, evaluate
from hpcmlx.errors import ConfigError
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.observe.timeline import OFF, Timeline
from hpcmlx.parallel.pipeline import Head
from hpcmlx.parallel.schedule import Action, Kind, source, tag, target
from hpcmlx.training.data.batches import Microbatch
from hpcmlx.training.documents import document_caches
from hpcmlx.training.held import Held
from hpcmlx.training.loss import Loss
from hpcmlx.training.reduce import in_buckets

_MOST_LEAVES = 16  # arrays between two stages


@dataclass
class Chunk:
    """One stage of this rank and what is trained in it.

    Attributes:
        number: which of this rank's stages it is.
        names: of its trained parameters, those of later layers first: the backward pass reaches
            them first.
        head: of the last stage, with its loss; None on others.
    """

    number: int
    loaded: LoadedModel
    names: tuple[str, ...]
    head: Head | None
    loss: Loss | None
    held: Held = field(init=False)

    def __post_init__(self) -> None:
        self.held = Held(self.loaded.stage.model, self.names)
        stage = self.loaded.stage
        for leaf in (*stage.receives, *stage.sends):
            if not (leaf.fixed and mx.issubdtype(leaf.dtype, mx.floating)):
                raise ConfigError(
                    f"{self.loaded.config['model_type']}: what layer {leaf.layer} hands on across "
                    "a stage boundary has no gradient or no known shape, so it cannot be trained "
                    "in stages; use parallel.pp=1"
                )


@dataclass
class _Flight:
    """A microbatch whose backward pass is to come."""

    gradients: list[mx.array]
    arriving: list[Pending]


class Executor:
    """Runs schedules on this rank's chunks.

    Attributes:
        seconds_waiting: for other stages.
    """

    def __init__(
        self,
        mesh: Mesh,
        chunks: Sequence[Chunk],
        *,
        recompute: bool,
        bucket_bytes: int = 8 << 20,
        timeline: Timeline = OFF,
    ):
        """
        Args:
            recompute: layers are checkpointed. Then the gradients of inputs and parameters are
                evaluated together: one after the other, every layer's recomputed activations
                would have to stay.
            bucket_bytes: of gradients that are handed over at once.
        """
        self._mesh, self._chunks, self._recompute = mesh, chunks, recompute
        self._timeline = timeline
        self._num_microbatches = 0
        self._sends: list[Pending] = []
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._sums: dict[str, mx.array] = {}
        self._buckets = [self._in_buckets(chunk, bucket_bytes) for chunk in chunks]
        self.seconds_waiting = 0.0

    @staticmethod
    def _in_buckets(chunk: Chunk, most: int) -> list[list[str]]:
        sizes = {n: 4 * a.size for n, a in zip(chunk.names, chunk.held.get(), strict=True)}
        return in_buckets(chunk.names, sizes, most)

    def run(
        self,
        actions: Sequence[Action],
        microbatches: Sequence[Microbatch],
        scale: float,
        add: Callable[[Mapping[str, mx.array]], None],
    ) -> float:
        """Forward and backward over all microbatches.

        Args:
            actions: of this rank; for each of its chunks every microbatch in order.
            scale: what losses are multiplied by before they are differentiated: one over the
                targets of the whole step.
            add: takes gradients, float32, summed over the microbatches and evaluated, in buckets.

        Returns:
            The unscaled sum of -log p on the last stage; 0 on others.
        """
        self._num_microbatches = len(microbatches)
        last = {a.chunk: a for a in actions if a.kind is Kind.BACKWARD}
        total = 0.0
        for action in actions:
            begin = time.perf_counter()
            waited = self.seconds_waiting
            if action.kind is Kind.FORWARD:
                total += self._forward(action, microbatches[action.microbatch], scale)
            else:
                self._backward(action, add if action is last[action.chunk] else None)
            begin += self.seconds_waiting - waited
            self._timeline.record(
                action.kind.name.lower(), action.microbatch, begin, time.perf_counter(), 0
            )
        self._flush()
        return total

    def evaluate(self, microbatches: Sequence[Microbatch]) -> float:
        """The sum of -log p over all microbatches on the last stage, without gradients; 0 on
        others."""
        self._num_microbatches, total = len(microbatches), 0.0
        for number, microbatch in enumerate(microbatches):
            for chunk in self._chunks:
                action = Action(Kind.FORWARD, chunk.number, number)
                tokens = microbatch.tokens
                inputs = self._inputs(chunk, tokens)
                self._wait(self._receive(action, inputs))
                trained = chunk.held.get()
                outputs = self._outputs(chunk, microbatch, inputs, trained, gradients=False)
                evaluate(outputs)
                if chunk.loss is None:
                    self._send(action, outputs)
                else:
                    total += float(outputs[0])
        self._flush()
        return total

    # -- passes --

    def _forward(self, action: Action, microbatch: Microbatch, scale: float) -> float:
        chunk = self._chunks[action.chunk]
        tokens = microbatch.tokens
        inputs = self._inputs(chunk, tokens)
        self._wait(self._receive(action, inputs))
        if chunk.loss is None:
            cotangents = [_empty(s.shape(*tokens.shape), s.dtype) for s in chunk.loaded.stage.sends]
        else:
            cotangents = [mx.array(scale, mx.float32)]

        def outputs(*arrays: mx.array) -> list[mx.array]:
            given, trained = arrays[: len(inputs)], arrays[len(inputs) :]
            with chunk.held(trained):
                return self._outputs(chunk, microbatch, given, trained)

        made, gradients = mx.vjp(outputs, [*inputs, *chunk.held.get()], cotangents)
        evaluate(made)
        arriving: list[Pending] = []
        if chunk.loss is None:
            self._send(action, made)
            arriving = self._receive(replace(action, kind=Kind.BACKWARD), cotangents)
        self._flights[action.chunk, action.microbatch] = _Flight(gradients, arriving)
        return float(made[0]) if chunk.loss is not None else 0.0

    def _outputs(
        self,
        chunk: Chunk,
        microbatch: Microbatch,
        inputs: Sequence[mx.array],
        trained: Sequence[mx.array],
        *,
        gradients: bool = True,
    ) -> list[mx.array]:
        """What the stage sends, or the loss."""
        stage, tokens = chunk.loaded.stage, microbatch.tokens
        caches: list[Any] | None = None
        if microbatch.segments is not None:
            caches = document_caches(stage.model, microbatch.segments)
        if chunk.loss is None or chunk.head is None:
            return list(stage.run(tokens, inputs, caches))
        arrays = chunk.head.body(tokens, inputs, caches)
        own = chunk.head.parameters
        pairs = zip(chunk.names, trained, strict=True)
        used = {name: array for name, array in pairs if name in own}
        return [chunk.loss(arrays, tokens, microbatch.targets, used, gradients=gradients)]

    def _backward(
        self, action: Action, add: Callable[[Mapping[str, mx.array]], None] | None
    ) -> None:
        chunk = self._chunks[action.chunk]
        flight = self._flights.pop((action.chunk, action.microbatch))
        self._wait(flight.arriving)
        num_inputs = len(chunk.loaded.stage.receives)
        to_send = flight.gradients[:num_inputs]
        if not self._recompute:
            evaluate(to_send)
            self._send(action, to_send)
        sums = {}
        for name, gradient in zip(chunk.names, flight.gradients[num_inputs:], strict=True):
            gradient = gradient.astype(mx.float32)
            sums[name] = self._sums[name] + gradient if name in self._sums else gradient
        if self._recompute and to_send:
            evaluate(to_send, list(sums.values()))
            self._send(action, to_send)
        if add is None:
            evaluate(list(sums.values()))
            self._sums |= sums
            return
        for bucket in self._buckets[action.chunk]:
            part = {name: sums.pop(name) for name in bucket}
            evaluate(list(part.values()))
            add(part)
        for name in chunk.names:
            self._sums.pop(name, None)

    # -- messages --

    @staticmethod
    def _inputs(chunk: Chunk, tokens: mx.array) -> list[mx.array]:
        """Memory for what the stage receives."""
        return [
            _empty(leaf.shape(*tokens.shape), leaf.dtype) for leaf in chunk.loaded.stage.receives
        ]

    def _receive(self, action: Action, into: Sequence[mx.array]) -> list[Pending]:
        """What `action` takes in, into the memory of `into`."""
        mesh = self._mesh
        if (peer := source(action, mesh.pp, mesh.dims.pp, len(self._chunks))) is None:
            return []
        rank, number = mesh.replica_rank(peer[0], mesh.tp), tag(action, self._num_microbatches)
        return [
            mesh.replica.irecv_into(array, rank, number * _MOST_LEAVES + leaf)
            for leaf, array in enumerate(into)
        ]

    def _send(self, action: Action, arrays: Sequence[mx.array]) -> None:
        """What `action` has made, evaluated, to the stage that takes it."""
        mesh = self._mesh
        if (peer := target(action, mesh.pp, mesh.dims.pp, len(self._chunks))) is None:
            return
        rank, number = mesh.replica_rank(peer[0], mesh.tp), tag(peer[1], self._num_microbatches)
        self._sends = [p for p in self._sends if not p.done()]
        for leaf, array in enumerate(arrays):
            self._sends.append(mesh.replica.isend(array, rank, number * _MOST_LEAVES + leaf))

    def _wait(self, pending: Sequence[Pending]) -> None:
        begin = time.perf_counter()
        for message in pending:
            message.wait()
        self.seconds_waiting += time.perf_counter() - begin

    def _flush(self) -> None:
        for pending in self._sends:
            pending.wait()
        self._sends = []


def _empty(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array with memory of its own, which a message will fill."""
    array = mx.array(np.zeros(shape, np.float32)).astype(dtype)
    mx.eval(array)
    return array
