"""What the measured links cost a token, and in which order of hosts they cost least. Pure.

One rank a host. Ranks are dealt to hosts in the order of the host file: neighbours are
tensor-parallel partners first, then pipeline stages follow each other (`hpcmlx.mesh`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpcmlx.bench.link_file import Links
from hpcmlx.errors import UsageError

#: All orders are tried up to here; of 9 hosts there are 362,880.
MAX_ORDERED = 8
_AS_GOOD = 1.03
#: The graph's own all-reduce is what a tensor-parallel layer waits for.
_CURVES = ("all_reduce jaccl", "all_reduce mlx", "all_reduce mpi4py")


@dataclass(frozen=True)
class Cost:
    """Seconds of communication that one token of one row waits for.

    Attributes:
        pp: number of stages.
        order: of the hosts, by their numbers.
        all_reduces: two a layer.
        activations: their way through the stages, and the sampled token's way back.
    """

    pp: int
    order: tuple[int, ...]
    all_reduces: float
    activations: float

    @property
    def layout(self) -> str:
        return f"pp{self.pp}_tp{len(self.order) // self.pp}"

    @property
    def total(self) -> float:
        return self.all_reduces + self.activations


@dataclass(frozen=True)
class Shape:
    """What decides how much travels.

    Attributes:
        layers: of the model.
        hidden: numbers in a token's activation.
        itemsize: bytes of each.
    """

    layers: int
    hidden: int
    itemsize: int = 2

    @property
    def num_bytes(self) -> int:
        return self.hidden * self.itemsize


@dataclass(frozen=True)
class Costs:
    """Costs of a model on measured links."""

    links: Links
    model: Shape

    def layout(self, pp: int, order: Sequence[int] | None = None) -> Cost:
        """Of `pp` stages of as many tensor-parallel hosts each as there are.

        Args:
            order: of the hosts; None for that of the host file they were measured with.

        Raises:
            UsageError: the hosts cannot be dealt to `pp` stages equally.
        """
        num_hosts = len(self.links.hosts)
        if pp < 1 or num_hosts % pp:
            raise UsageError(f"{num_hosts} hosts do not make {pp} equal stages")
        order = tuple(range(num_hosts)) if order is None else tuple(order)
        width = num_hosts // pp
        stages = [order[i * width : (i + 1) * width] for i in range(pp)]
        layers = self.model.layers / pp
        all_reduces = sum(2 * layers * self.all_reduce(stage) for stage in stages)
        return Cost(pp, order, all_reduces, self._chain(stages))

    def best(self, pp: int) -> Cost:
        """The cheapest order; of those that cost as much but for what measuring is off by, the one
        that leaves the first hosts where they are.

        Raises:
            UsageError: there are more hosts than `MAX_ORDERED`.
        """
        num_hosts = len(self.links.hosts)
        if num_hosts > MAX_ORDERED:
            raise UsageError(f"orders are tried for up to {MAX_ORDERED} hosts, not {num_hosts}")
        costs = [self.layout(pp, order) for order in itertools.permutations(range(num_hosts))]
        least = min(cost.total for cost in costs)
        return next(cost for cost in costs if cost.total <= least * _AS_GOOD)

    def all_reduce(self, hosts: Sequence[int]) -> float:
        """Seconds of one all-reduce of a token's activation among some of the hosts.

        Recursive doubling (Thakur, Rabenseifner and Gropp 2005, section 4.4), which MPI takes for
        so small a message: each round waits for the worst of its links. That is scaled by what all
        hosts together were measured to take.
        """
        return self._calibration * self._rounds(tuple(sorted(hosts))) if len(hosts) > 1 else 0.0

    def send(self, source: int, dest: int, num_bytes: int) -> float:
        """Seconds of one message: its latency, and its bytes at the link's speed."""
        links = self.links
        return float(links.latency_best[source, dest] + num_bytes / links.bandwidth[source, dest])

    def _chain(self, stages: Sequence[Sequence[int]]) -> float:
        """From each rank of a stage to the same of the next; the slowest of them counts."""
        if len(stages) == 1:
            return 0.0
        hops = sum(
            max(self.send(a, b, self.model.num_bytes) for a, b in zip(here, there, strict=True))
            for here, there in itertools.pairwise(stages)
        )
        return hops + self.send(stages[-1][0], stages[0][0], 4)

    def _rounds(self, hosts: tuple[int, ...]) -> float:
        pairs = itertools.permutations(hosts, 2)
        worst = max(self.send(a, b, self.model.num_bytes) for a, b in pairs)
        return math.ceil(math.log2(len(hosts))) * worst

    @cached_property
    def _calibration(self) -> float:
        measured = self.measured
        everybody = tuple(range(len(self.links.hosts)))
        return 1.0 if measured is None else measured / self._rounds(everybody)

    @cached_property
    def measured(self) -> float | None:
        """Seconds of an all-reduce of that size over all ranks, between the sizes measured."""
        for name in _CURVES:
            curve = self.links.curves.get(name)
            if curve is None:
                continue
            there = np.isfinite(curve[:, 1])
            sizes, seconds = self.links.sizes[there], curve[there, 1]
            if len(sizes) and sizes[0] <= self.model.num_bytes <= sizes[-1]:
                return float(np.interp(self.model.num_bytes, sizes, seconds))
        return None
