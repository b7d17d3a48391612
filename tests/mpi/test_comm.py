"""What ranks tell each other without waiting: a shared counter, a mailbox, rows dealt out."""

from __future__ import annotations

import time

import mlx.core as mx
import pytest

from hpcmlx.comm import Counter, Mailbox
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.parallel.dealer import Dealer
from hpcmlx.parallel.vote import StopVote

pytestmark = pytest.mark.mpi


def test_every_number_is_counted_once(world):
    counter = Counter(world)
    mine = [counter.fetch_add(1) for _ in range(200)]
    counter.close()
    assert mine == sorted(mine)
    everybody = sum(world.allgather(mine), [])
    assert sorted(everybody) == list(range(200 * world.size))


def test_counts_of_several_at_a_time(world):
    counter = Counter(world)
    counts = [1 + (world.rank + i) % 5 for i in range(40)]
    ranges = [(counter.fetch_add(n), n) for n in counts]
    counter.close()
    taken = [start + i for part in world.allgather(ranges) for start, n in part for i in range(n)]
    assert sorted(taken) == list(range(len(taken)))


def test_a_slow_rank_holds_nobody_up(world):
    counter = Counter(world)
    world.barrier()
    begin = time.perf_counter()
    if world.rank == 0:
        time.sleep(1.5)  # the counter lives here
    else:
        for _ in range(50):
            counter.fetch_add(1)
        assert time.perf_counter() - begin < 1.2
    counter.close()


def test_posts_arrive_once_and_in_order(world):
    mailbox = Mailbox(world)
    arrived = []
    for i in range(20):
        mailbox.post((world.rank, i))
        if world.rank == 0:
            arrived += mailbox.poll()
    arrived += mailbox.close()
    if world.rank:
        assert arrived == []
        return
    for rank in range(world.size):
        assert [v for source, v in arrived if source == rank] == [(rank, i) for i in range(20)]


def test_posting_never_waits_for_rank_0(world):
    mailbox = Mailbox(world)
    world.barrier()
    begin = time.perf_counter()
    if world.rank == 0:
        time.sleep(1.5)
    for i in range(10):
        mailbox.post("x" * 100 * i)
    if world.rank:
        assert time.perf_counter() - begin < 1.2
    mailbox.close()


@pytest.mark.parametrize("total", [0, 1, 7, 100])
def test_rows_are_dealt_once_and_alike_within_a_replica(world, total):
    dp = 2 if world.size % 2 == 0 else world.size
    mesh = Mesh(ParallelDims(dp=dp, tp=world.size // dp), world)
    dealer = Dealer(mesh, total)
    mine = []
    while not dealer.exhausted:
        mine += dealer.draw(3)
    assert list(dealer.draw(3)) == []
    dealer.close()
    assert all(other == mine for other in mesh.replica.allgather(mine))
    leaders = world.allgather(mine if mesh.replica.rank == 0 else [])
    assert sorted(sum(leaders, [])) == list(range(total))


@pytest.mark.parametrize("asking", [0, -1])
def test_all_ranks_stop_at_the_same_point(world, asking):
    """Whichever rank is asked, and however far it is ahead."""
    vote, rounds = StopVote(world), 0
    time.sleep(0.02 * world.rank)
    while not vote.ask(rounds >= 5 and world.rank == asking % world.size):
        rounds += 1
        assert rounds < 100
    vote.close()
    assert len(set(world.allgather(rounds))) == 1
    assert 5 <= rounds <= 7  # nobody waits for a vote, and nobody goes on for long


def test_another_group_for_the_graph(world):
    """As JACCL's is put beside MPI's: sums in the graph go there, the rest stays."""
    alone = world.split(world.rank, 0, graph=world.size > 1)
    mixed = world.with_graph(alone._group)
    assert mixed.allgather(world.rank) == list(range(world.size))
    assert mixed.all_sum(mx.array([1.0])).item() == 1.0
