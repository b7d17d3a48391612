"""Gradients made whole: over replicas in buckets beside the backward pass, then over the
tensor-parallel ranks and the stages that share a parameter.

All of these are sums, so their order is free. The executor hands gradients over as they are ready,
the trainer takes the sums.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx

from hpcmlx.comm import Communicator, evaluate
from hpcmlx.mesh import Mesh
from hpcmlx.training.placement import Place


class GradientSum:
    """Sums the gradients of a step over all ranks that share their parameters. A context manager.

    Attributes:
        seconds_waiting: for other ranks, in `finish`.
    """

    def __init__(self, mesh: Mesh, places: Mapping[str, Place], bucket_bytes: int = 8 << 20):
        """
        Args:
            bucket_bytes: of one message between replicas.
        """
        self._mesh, self._places, self.bucket_bytes = mesh, places, bucket_bytes
        # A thread waits inside MPI while this one computes; it alone uses the replicas' group.
        self._thread = ThreadPoolExecutor(1, "reduce") if mesh.dims.dp > 1 else None
        self._pending: list[tuple[list[str], Future[list[mx.array]]]] = []
        self._done: dict[str, mx.array] = {}
        self._tied = self._tied_groups()
        self.seconds_waiting = 0.0

    def __enter__(self) -> GradientSum:
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=error[0] is None)

    def _tied_groups(self) -> dict[tuple[int, ...], Communicator]:
        """For each set of stages that share parameters, the ranks of one tensor-parallel place on
        them. Collective over the replica."""
        mesh = self._mesh
        mine = {place.stages for place in self._places.values() if len(place.stages) > 1}
        groups = {}
        for stages in sorted(set().union(*mesh.replica.allgather(mine))):
            inside = mesh.pp in stages
            color = mesh.tp if inside else mesh.dims.tp
            group = mesh.replica.split(color, mesh.replica.rank, name="tied")
            if inside:
                groups[stages] = group
        return groups

    def add(self, gradients: Mapping[str, mx.array]) -> None:
        """Gradients of this replica, evaluated and whole over its microbatches. Every replica
        gives the same names in the same order."""
        names, arrays = list(gradients), list(gradients.values())
        if self._thread is None:
            self._done |= gradients
        else:
            summed = self._thread.submit(self._mesh.dp_group.sum_arrays, arrays)
            self._pending.append((names, summed))

    def finish(self) -> dict[str, mx.array]:
        """The sums of everything given to `add`, evaluated, float32. Collective over the world."""
        begin = time.perf_counter()
        for names, summed in self._pending:
            self._done |= zip(names, summed.result(), strict=True)
        self._pending = []
        gradients, self._done = self._done, {}
        self._sum_over_tp(gradients)
        for stages, group in self._tied.items():
            names = sorted(n for n in gradients if self._places[n].stages == stages)
            gradients |= zip(names, group.sum_arrays([gradients[n] for n in names]), strict=True)
        self.seconds_waiting += time.perf_counter() - begin
        return gradients

    def _sum_over_tp(self, gradients: dict[str, mx.array]) -> None:
        """One message with all that is not simply cut. What is equal on all ranks is taken from
        the first, so that copies cannot drift apart by rounding."""
        group = self._mesh.tp_group
        names = sorted(n for n in gradients if self._places[n].kind != "cut")
        if group.size == 1 or not names:
            return
        parts: list[mx.array] = []
        for name in names:
            place, gradient = self._places[name], gradients[name]
            if place.kind == "equal" and group.rank:
                gradient = mx.zeros_like(gradient)
            parts.append(place.spread(gradient))
        for name, total in zip(names, group.sum_arrays(parts), strict=True):
            gradients[name] = mx.contiguous(self._places[name].local(total))
        evaluate([gradients[name] for name in names])


def own_square_sum(gradients: Mapping[str, mx.array], places: Mapping[str, Place]) -> float:
    """Sum of squares of what this rank answers for; over a replica they add up to the square of
    the norm. Not finite where a gradient is not."""
    squares = [
        mx.sum(mx.square(places[name].own(gradient)))
        for name, gradient in gradients.items()
        if not places[name].owns_nothing
    ]
    return float(mx.sum(mx.stack(squares))) if squares else 0.0


def in_buckets(names: Sequence[str], sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """`names` in order, cut into runs of at most `most` bytes, or of one name. Pure."""
    buckets: list[list[str]] = []
    room = 0
    for name in names:
        if not buckets or sizes[name] > room:
            buckets.append([])
            room = most
        buckets[-1].append(name)
        room -= sizes[name]
    return buckets
