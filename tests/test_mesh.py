"""The rank grid: coordinates, groups, names and refusals."""

from __future__ import annotations

from itertools import product

import pytest

from hpcmlx.comm import Communicator
from hpcmlx.errors import ExitCode, UsageError
from hpcmlx.mesh import Mesh, ParallelDims


class FakeWorld:
    """A world that answers `split` from what every rank of it would ask for."""

    def __init__(self, rank, size):
        self.rank, self.size, self.asked = rank, size, []

    def split(self, color, key, graph=False, name=""):
        self.asked.append((color, key, graph))
        return Communicator()


def test_names_and_sizes():
    assert str(ParallelDims(1, 2, 2)) == "dp1_pp2_tp2"
    assert str(ParallelDims()) == "dp1_pp1_tp1"
    assert ParallelDims(2, 3, 4).world_size == 24


@pytest.mark.parametrize("dims", [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 4), (2, 3, 4)])
def test_coordinates_are_dp_then_pp_then_tp(dims):
    grid = ParallelDims(*dims)
    places = [grid.coordinates(rank) for rank in range(grid.world_size)]
    assert places == list(product(*map(range, dims)))


@pytest.mark.parametrize("axis", ["dp", "pp", "tp"])
@pytest.mark.parametrize("value", [0, -1])
def test_an_axis_has_one_rank_at_least(axis, value):
    with pytest.raises(UsageError, match=rf"parallel\.{axis} must be at least 1, not {value}"):
        ParallelDims(**{axis: value})


@pytest.mark.parametrize(("size", "words"), [(1, "1 rank started"), (3, "3 ranks started")])
def test_a_world_of_another_size_is_refused(size, words):
    with pytest.raises(UsageError) as refusal:
        Mesh(ParallelDims(pp=2, tp=2), FakeWorld(0, size))
    message = str(refusal.value)
    assert "dp1_pp2_tp2 needs 4 ranks" in message and words in message
    assert "mpirun -n 4" in message and "\n" not in message
    assert refusal.value.exit_code == ExitCode.USAGE


def test_groups_are_split_along_the_axes():
    """Every rank asks in the same order; equal colours meet in exactly the right groups."""
    dims = ParallelDims(2, 3, 2)
    worlds = [FakeWorld(rank, 12) for rank in range(12)]
    meshes = [Mesh(dims, world) for world in worlds]
    kinds = (("dp", "pp"), ("dp",), ("pp", "tp"))  # what tp_group, replica and dp_group share
    for number, shared in enumerate(kinds):
        for a, b in product(range(12), repeat=2):
            same = all(getattr(meshes[a], k) == getattr(meshes[b], k) for k in shared)
            assert (worlds[a].asked[number][0] == worlds[b].asked[number][0]) == same
        # Ordered by world rank, so that the coordinate is the rank in the group.
        assert [w.asked[number][1] for w in worlds] == list(range(12))
    assert [graph for _, _, graph in worlds[0].asked] == [True, False, False]
    place = {(m.pp, m.tp): m.replica_rank(m.pp, m.tp) for m in meshes[:6]}
    assert list(place.values()) == list(range(6))


def test_without_tensor_parallelism_no_graph_group_is_made():
    world = FakeWorld(1, 2)
    Mesh(ParallelDims(pp=2), world)
    assert not any(graph for _, _, graph in world.asked)


def test_ends_of_the_pipeline_and_the_name():
    first, middle, last = (Mesh(ParallelDims(pp=3), FakeWorld(rank, 3)) for rank in range(3))
    assert (first.is_first_stage, first.is_last_stage) == (True, False)
    assert (middle.is_first_stage, middle.is_last_stage) == (False, False)
    assert (last.is_first_stage, last.is_last_stage) == (False, True)
    assert str(middle) == "dp1_pp3_tp1 [dp 0, pp 1, tp 0]"


def test_a_world_of_one_needs_no_mpi():
    mesh = Mesh(ParallelDims(), Communicator())
    assert mesh.is_first_stage and mesh.is_last_stage
    assert mesh.tp_group.size == mesh.replica.size == mesh.dp_group.size == 1
    assert mesh.replica.allgather(3) == [3]
