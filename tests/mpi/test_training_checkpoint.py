"""Checkpoints saved and read on as many ranks as there are, with a shared directory and without."""

from __future__ import annotations

import os
import time

import mlx.core as mx
import pytest

from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.training.checkpoints import store as checkpoint
from hpcmlx.training.checkpoints.pieces import Piece, without_copies
from hpcmlx.training.checkpoints.store import CheckpointStore
from tests.checkpoints import assert_found, held, own, steps_in

pytestmark = pytest.mark.mpi


def even(size: int) -> tuple[int, ...]:
    return (1,) * size


def uneven(size: int) -> tuple[int, ...]:
    return tuple(range(1, size + 1))


@pytest.mark.parametrize("ranks_per_host", [1, 2, 4])
def test_saved_in_one_layout_and_read_in_others(world, shared, ranks_per_host):
    directory = own(shared / f"layouts-{ranks_per_host}", world, ranks_per_host)
    store = CheckpointStore(directory, world)
    for step in (10, 20, 30):
        pieces = without_copies(world, held(uneven(world.size), world.rank, step))
        store.save(step, pieces, {"data": step * 100}, metric=step)
    while store.poll() is None:
        time.sleep(0.001)
    with CheckpointStore(directory, world).find() as found:
        for shares in (even(world.size), uneven(world.size)):
            assert_found(found, 30, shares, world.rank)
        assert_found(found, 30)
    with store.find("best") as found:
        assert_found(found, 10, even(world.size), world.rank)
    world.barrier()
    assert steps_in(directory) == [10, 20, 30]
    assert len(os.listdir(directory / "step-00000030")) == world.size + 1


@pytest.mark.fault
def test_a_shard_that_no_host_has_is_seen_by_all(world, shared):
    directory = own(shared / "lost", world)
    store = CheckpointStore(directory, world)
    for step in (10, 20):
        pieces = without_copies(world, held(even(world.size), world.rank, step))
        store.save(step, pieces, {"data": step * 100})
    store.poll(wait=True)
    if world.rank == world.size - 1:
        (directory / f"step-00000020/shard-{world.rank:05}.h5").unlink()
    world.barrier()
    with pytest.raises(IntegrityError, match=f"shard-{world.size - 1:05}.h5") as refused:
        store.find()
    assert len(set(world.allgather(str(refused.value)))) == 1
    with store.find(skip_damaged=True) as found:
        assert_found(found, 10, even(world.size), world.rank)
    world.barrier()


@pytest.mark.fault
def test_a_rank_that_cannot_write_fails_the_save_on_all(world, shared, monkeypatch):
    directory = own(shared / "failed", world)
    store = CheckpointStore(directory, world)
    piece = {"w": Piece(mx.ones(3), (3,))} if world.rank == world.size - 1 else {}
    store.save(1, piece, {})
    assert store.poll(wait=True) == 1

    def fail(path, snapshots):
        raise StorageError(f"no room for {path}")

    monkeypatch.setattr(checkpoint, "write_shard", fail)
    store.save(2, piece, {})
    with pytest.raises(StorageError, match="no room for .*step-00000002.tmp/shard") as failed:
        store.poll(wait=True)
    if world.size > 1:
        assert f"rank {world.size - 1} on " in str(failed.value)
    assert steps_in(directory) == [1]
    assert store.find().step == 1
