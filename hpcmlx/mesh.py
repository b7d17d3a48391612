"""The rank grid: dp replicas of pp pipeline stages of tp tensor-parallel ranks.

Neighbouring ranks are tensor-parallel partners (they talk most, so they should share a host or
the fastest link), then come the stages, then the replicas. Passed explicitly, never a global.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcmlx.comm import Communicator
from hpcmlx.errors import UsageError
from hpcmlx.launch.placement import RankHosts


@dataclass(frozen=True)
class ParallelDims:
    """How many ranks each axis has. Prints as `dp1_pp2_tp2`."""

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in ("dp", "pp", "tp"):
            if getattr(self, axis) < 1:
                raise UsageError(f"parallel.{axis} must be at least 1, not {getattr(self, axis)}")

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return f"dp{self.dp}_pp{self.pp}_tp{self.tp}"

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(dp, pp, tp) coordinates of a world rank."""
        replica, inside = divmod(rank, self.pp * self.tp)
        return replica, *divmod(inside, self.tp)

    def check_world(self, world_size: int) -> None:
        """
        Raises:
            UsageError: the product of the axes is not the number of ranks that were started.
        """
        if self.world_size != world_size:
            plural = "" if world_size == 1 else "s"
            raise UsageError(
                f"layout {self} needs {self.world_size} ranks but {world_size} rank{plural} "
                f"started: run `mpirun -n {self.world_size} …` or change parallel.dp|pp|tp"
            )


class Mesh:
    """This rank's place in the grid and its groups.

    Attributes:
        dims: the grid.
        dp, pp, tp: this rank's coordinates.
        world: all ranks.
        tp_group: the ranks of one stage of one replica; has collectives in the graph.
        replica: all stages of one replica (rank = pp * dims.tp + tp).
        dp_group: the same part of every replica.
        hosts: what the ranks have of their hosts; None where nothing is said of these.
    """

    def __init__(self, dims: ParallelDims, world: Communicator, hosts: RankHosts | None = None):
        dims.check_world(world.size)
        self.dims, self.world, self.hosts = dims, world, hosts
        self.dp, self.pp, self.tp = dims.coordinates(world.rank)
        rank = world.rank
        self.tp_group = world.split(rank // dims.tp, rank, graph=dims.tp > 1, name="tp")
        self.replica = world.split(self.dp, rank, name="replica")
        self.dp_group = world.split(rank % (dims.pp * dims.tp), rank, name="dp")

    @property
    def is_first_stage(self) -> bool:
        return self.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp == self.dims.pp - 1

    def replica_rank(self, pp: int, tp: int) -> int:
        """Rank within `replica` of stage `pp`, tensor rank `tp`."""
        return pp * self.dims.tp + tp

    def __str__(self) -> str:
        return f"{self.dims} [dp {self.dp}, pp {self.pp}, tp {self.tp}]"
