"""Who holds the others up: how long each rank works on its own part, against the others.

A rank's own time is what is left of its time when it does not wait for others. Stages and replicas
know what they wait. Tensor-parallel ranks wait inside MLX's graph, where nobody can look: there the
one that waits least gives the time of an evaluation, and a matrix product that every rank does for
itself now and then (`Probe`) tells how much slower its device is than another's.
`summary.write_summary` is the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from hpcmlx.flight import recorder
from hpcmlx.mesh import Mesh

#: A rank that needs so many times as long as the others is named.
TOO_SLOW = 2.0
_SHORTEST = 1.0
_PROBE_SECONDS, _PROBE_SIZE = 2.0, 256
_PROBES = 3  # before a block that is measured, and after it


@dataclass(frozen=True)
class Pace:
    """What a rank's time went into.

    Attributes:
        tp_group: equal on the ranks of one tensor-parallel group.
        seconds: all of it, from the first step to the last.
        waiting: of these, for other stages and replicas.
        evaluating: of these, in evaluations; with tensor parallelism, waiting for the group too.
        probe: mean seconds of the probe; None: this rank has not done it.
        work: tokens, or steps, that its replica has done in that time.
    """

    tp_group: int
    seconds: float
    waiting: float
    evaluating: float
    probe: float | None
    work: int


class Probe:
    """Times a matrix product of this rank's own. Only where no evaluation is under way: behind one
    it would wait for the other ranks, whatever stream it is on."""

    def __init__(self, enabled: bool, clock: Callable[[], float] = time.perf_counter):
        self._enabled, self._clock = enabled, clock
        self._next = -float("inf")
        self._total, self._count = 0.0, 0
        if enabled:
            self._matrix = mx.ones((_PROBE_SIZE, _PROBE_SIZE))
            mx.eval(self._matrix)
            self._product()  # the first one also compiles

    def look(self, now: bool = False) -> None:
        """Measure if it is time.

        Args:
            now: it is.
        """
        if not self._enabled or ((begin := self._clock()) < self._next and not now):
            return
        self._product()
        end = self._clock()
        self._total, self._count = self._total + end - begin, self._count + 1
        self._next = end + _PROBE_SECONDS

    @property
    def seconds(self) -> float | None:
        """The mean; None before the first one."""
        return self._total / self._count if self._count else None

    def _product(self) -> None:
        mx.eval(mx.matmul(self._matrix, self._matrix))


class Meter:
    """What this rank's time goes into while a block runs; a context manager. Before and after it no
    evaluation may be under way."""

    def __init__(self, mesh: Mesh):
        self._group = mesh.world.rank // mesh.dims.tp
        self._probe = Probe(mesh.dims.tp > 1)

    def __enter__(self) -> Meter:
        self._look()
        self._evaluating, self._waiting = recorder.evaluating, recorder.waiting
        self._begin = time.perf_counter()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._seconds = time.perf_counter() - self._begin
        self._evaluating = recorder.evaluating - self._evaluating
        self._waiting = recorder.waiting - self._waiting
        if kind is None:
            self._look()  # in the state that the work has put the device into

    def pace(self, work: int) -> Pace:
        """After the block, in which the rank's replica has done `work`."""
        times = self._seconds, self._waiting, self._evaluating, self._probe.seconds
        return Pace(self._group, *times, work)

    def _look(self) -> None:
        for _ in range(_PROBES):
            self._probe.look(now=True)


def own_seconds(paces: Sequence[Pace]) -> list[float]:
    """What each rank has worked itself. Pure."""
    found = []
    for pace in paces:
        group = [other for other in paces if other.tp_group == pace.tp_group]
        probes = [other.probe for other in group if other.probe is not None]
        computing = min(other.evaluating for other in group)
        if len(group) > 1 and pace.probe is not None and len(probes) == len(group):
            computing *= pace.probe / max(probes)
        found.append(max(0.0, pace.seconds - pace.waiting - pace.evaluating + computing))
    return found


def scores(paces: Sequence[Pace]) -> tuple[list[float | None], str | None]:
    """How many times as long as the median of the others each rank needs for a piece of work. Pure.

    Returns:
        One score a rank, 1 being like the others; where one is None, why.
    """
    if len(paces) < 2:
        return [None] * len(paces), "one rank has none to be compared with"
    per_work = [
        own / pace.work if pace.work else None
        for own, pace in zip(own_seconds(paces), paces, strict=True)
    ]
    found: list[float | None] = []
    for rank, mine in enumerate(per_work):
        others = [x for other, x in enumerate(per_work) if other != rank and x]
        found.append(None if mine is None or not others else mine / median(others))
    return found, "a replica has done no work" if None in found else None


def slowest(paces: Sequence[Pace], found: Sequence[float | None]) -> int | None:
    """The rank with the highest score, if that is `TOO_SLOW` or more. Pure. A run of less than a
    second, of which the first steps are most, says nothing."""
    if max((pace.seconds for pace in paces), default=0.0) < _SHORTEST:
        return None
    known = {rank: score for rank, score in enumerate(found) if score is not None}
    rank = max(known, key=lambda rank: known[rank], default=None)
    return rank if rank is not None and known[rank] >= TOO_SLOW else None
