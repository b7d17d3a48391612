"""What the tests of checkpoints save: a few tensors whose numbers tell the step, in any layout, on
ranks that are threads."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np

from hpcmlx.comm import Communicator
from hpcmlx.errors import IntegrityError, OutputError, StorageError
from hpcmlx.parallel.partition import Cut, offsets, split_by_weight, split_heads
from hpcmlx.training.checkpoints.pieces import Piece, without_copies
from hpcmlx.training.checkpoints.store import CheckpointStore

ALONE = Communicator()
HANDLED = (IntegrityError, OutputError, StorageError)
TIMEOUT = 30


class ThreadWorld:
    """Ranks as threads: a rank that leaves the others alone in a collective fails all of them."""

    def __init__(self, rank: int, size: int, shared: dict):
        self.rank, self.size, self._shared = rank, size, shared

    def allgather(self, value):
        slots, barrier = self._shared["slots"], self._shared["barrier"]
        slots[self.rank] = value
        barrier.wait(TIMEOUT)
        found = list(slots)
        barrier.wait(TIMEOUT)
        return found

    def bcast(self, value, root: int = 0):
        return self.allgather(value)[root]

    def barrier(self) -> None:
        self.allgather(None)

    def split(self, color: int, key: int, graph: bool = False, name: str = ""):
        colors = self.allgather(color)
        members = [rank for rank, other in enumerate(colors) if other == color]
        shared = self.allgather(meeting(len(members)))[members[0]]
        return ThreadWorld(members.index(self.rank), len(members), shared)


def meeting(size: int) -> dict:
    return {"slots": [None] * size, "barrier": threading.Barrier(size)}


def on_ranks(size: int, function) -> list:
    """What `function(world)` gives on every rank; of several errors, the first real one is raised
    and has the others in `everyone`."""
    shared, results = meeting(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadWorld(rank, size, shared))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, HANDLED):
                shared["barrier"].abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bugs = [r for r in results if isinstance(r, BaseException) and not isinstance(r, HANDLED)]
    if bugs:
        raise min(bugs, key=lambda bug: isinstance(bug, threading.BrokenBarrierError))
    return results


# -- a model of a few tensors, held in any layout --

NUM_QUERY, NUM_KV, HEAD = 6, 2, 2
LAYOUTS = [(1,), (1, 1), (3, 1, 2), (1, 1, 1, 1)]  # shares of the ranks


def tensors(step: int = 0) -> dict[str, mx.array]:
    """Every number of it tells the step."""
    rng = np.random.default_rng(step)

    def numbers(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32))

    return {
        "params/q": numbers(NUM_QUERY * HEAD, 5),
        "params/k": numbers(NUM_KV * HEAD, 5).astype(mx.bfloat16),
        "params/o": numbers(5, NUM_QUERY * HEAD).astype(mx.float16),
        "params/norm": numbers(7),
        "adam/q/m": numbers(NUM_QUERY * HEAD, 5) * float("nan"),
        "adam/step": mx.array(step, mx.uint64),
        "mask": mx.array([True, False, True]),
        "none": mx.zeros((0, 3), mx.int32),
    }


def cuts(shares: tuple[int, ...], rank: int) -> dict[str, Cut | None]:
    """What a rank holds of the tensors: uneven shares, KV heads that several ranks hold and that
    one rank holds twice."""
    start, stop = offsets(split_by_weight(NUM_QUERY * HEAD, shares, 1))[rank]
    kv = split_heads(NUM_QUERY, NUM_KV, shares)[rank].key_value
    rows, columns = Cut(0, ((start, stop),)), Cut(1, ((start, stop),))
    heads = Cut(0, tuple((HEAD * head, HEAD * (head + 1)) for head in kv))
    known = {"params/q": rows, "adam/q/m": rows, "params/o": columns, "params/k": heads}
    return {name: known.get(name) for name in tensors()}


def part(array: mx.array, cut: Cut | None) -> mx.array:
    if cut is None:
        return array
    index = [i for start, stop in cut.intervals for i in range(start, stop)]
    return mx.take(array, mx.array(index, mx.int32), cut.axis)


def held(shares: tuple[int, ...], rank: int, step: int = 0) -> dict[str, Piece]:
    where = cuts(shares, rank)
    return {
        name: Piece(part(array, where[name]), array.shape, where[name])
        for name, array in tensors(step).items()
    }


def assert_equal(found: mx.array, expected: mx.array) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[found.itemsize]
    assert mx.array_equal(found.view(bits), expected.view(bits)).item()


def assert_found(found, step: int, shares: tuple[int, ...] = (1,), rank: int = 0) -> None:
    """It is what `save` wrote at this step, in a layout."""
    assert found is not None and found.step == step and found.state == {"data": step * 100}
    expected = tensors(step)
    assert found.tensors == {name: (a.shape, a.dtype) for name, a in expected.items()}
    for name, cut in cuts(shares, rank).items():
        assert_equal(found.read(name, cut), part(expected[name], cut))


def save(store: CheckpointStore, step: int, metric: float | None = None) -> None:
    store.save(step, held((1,), 0, step), {"data": step * 100}, metric)
    assert store.poll(wait=True) == step


def steps_in(directory: Path) -> list[int]:
    """Of committed checkpoints; there is nothing else."""
    names = sorted(os.listdir(directory))
    assert all(re.fullmatch(r"step-\d{8}", name) for name in names), names
    return [int(name[5:]) for name in names]


def open_store(directory: Path, **how) -> CheckpointStore:
    return CheckpointStore(directory, ALONE, **how)


def own(tmp_path: Path, world, ranks_per_host: int = 1) -> Path:
    """A directory that only the ranks of one "host" see."""
    return tmp_path / f"host{world.rank // ranks_per_host}" / "ck"


def write_on_hosts(tmp_path: Path, world, shares: tuple[int, ...], *steps: int) -> None:
    store = CheckpointStore(own(tmp_path, world), world)
    for step in steps:
        mine = without_copies(world, held(shares, world.rank, step))
        store.save(step, mine, {"data": step * 100}, 1 / step)
        assert store.poll(wait=True) == step
