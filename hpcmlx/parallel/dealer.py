"""Deals the rows of a job to the replicas, each as many as it has room for, when it has room.

Nobody plans who gets what: all replicas count one counter up, so a slow replica takes fewer rows
and holds nobody up. Within a replica all ranks are dealt the same rows at the same point of their
schedule. The engine is the caller.
"""

from __future__ import annotations

from hpcmlx.comm import Counter
from hpcmlx.mesh import Mesh


class Dealer:
    """Deals the numbers 0 … total - 1. Made and closed by all ranks of the world together.

    Attributes:
        dealt_to: where the numbers that anybody may still be dealt begin, as far as this replica
            has seen.
    """

    def __init__(self, mesh: Mesh, total: int):
        self._mesh, self._total, self.dealt_to = mesh, total, 0
        self._counter = Counter(mesh.world) if mesh.dims.dp > 1 else None

    @property
    def exhausted(self) -> bool:
        return self.dealt_to >= self._total

    def draw(self, count: int) -> range:
        """The next `count` numbers, fewer at the end. The same on every rank of the replica, which
        all call it at the same point of their schedule."""
        if self.exhausted or count <= 0:
            return range(0)
        start = self.dealt_to
        if self._counter is not None:
            leader = self._mesh.replica.rank == 0
            start = self._mesh.replica.bcast(self._counter.fetch_add(count) if leader else None)
        self.dealt_to = start + count
        return range(min(start, self._total), min(start + count, self._total))

    def close(self) -> None:
        if self._counter is not None:
            self._counter.close()
