"""Which part of a tensor is where: pure arithmetic, and what of it is kept how long."""

from __future__ import annotations

import random
import re

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.errors import IntegrityError
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.checkpoints.commit import superfluous
from hpcmlx.training.checkpoints.pieces import (
    Piece,
    Tensor,
    assemble,
    describe,
    first_held,
    tabulate,
)
from hpcmlx.training.checkpoints.shards import chunk_shape
from tests.checkpoints import part

# -- index arithmetic --


def test_any_cut_from_any_others():
    rng = random.Random(0)

    def some_cut(axis: int, length: int, exact: bool) -> list[Cut]:
        edges = sorted({0, length, *rng.choices(range(length + 1), k=4)})
        spans = list(zip(edges, edges[1:], strict=False))
        rng.shuffle(spans)
        if not exact:
            return [Cut(axis, tuple(rng.choices(spans, k=3)))]
        return [Cut(axis, tuple(spans[rank::3])) for rank in range(3)]

    for _ in range(200):
        shape = (rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 3))
        whole = np.arange(np.prod(shape)).reshape(shape)
        axis, other = rng.randrange(3), rng.randrange(3)
        parts = dict(enumerate(some_cut(axis, shape[axis], True)))
        parts = {rank: cut for rank, cut in parts.items() if cut.size}
        arrays = {rank: np.array(part(mx.array(whole), cut)) for rank, cut in parts.items()}
        for wanted in [None, *some_cut(other, shape[other], False)]:
            goal = whole if wanted is None else np.array(part(mx.array(whole), wanted))
            built = np.full(goal.shape, -1)
            for block in assemble("t", Tensor(shape, "int64", parts), wanted):
                built[block.target] = arrays[block.rank][block.source]
            assert np.array_equal(built, goal)


@pytest.mark.parametrize(
    "spans, said",
    [
        ([[(0, 4)], [(5, 8)]], "positions 4:5 of axis 0 of tensor w [8, 2] are held by no rank"),
        ([[(0, 4)], [(4, 7)]], "positions 7:8 of axis 0 of tensor w [8, 2] are held by no rank"),
        ([[(0, 5)], [(4, 8)]], "positions 4:5 .* are held twice, by ranks 0 and 1"),
        ([[(0, 4), (0, 4)], [(4, 8)]], "positions 0:4 .* are held twice, by ranks 0 and 0"),
        ([None, [(4, 8)]], "positions 4:8 .* are held twice"),
        ([[(0, 4)], [(4, 9)]], "positions 8:9 .* do not exist"),
    ],
)
def test_what_is_not_there_exactly_once_is_refused_by_name(spans, said):
    held = []
    for part_of in spans:
        cut = None if part_of is None else Cut(0, tuple(part_of))
        shape = (8, 2) if cut is None else cut.shape((8, 2))
        held.append({"w": describe(Piece(mx.zeros(shape), (8, 2), cut))})
    with pytest.raises(IntegrityError, match=re.escape(said).replace(r"\.\*", ".*")):
        tabulate(held)


def test_ranks_that_do_not_agree_on_a_tensor():
    whole = Piece(mx.zeros((4, 2)), (4, 2))
    rows = Piece(mx.zeros((2, 2)), (4, 2), Cut(0, ((0, 2),)))
    columns = Piece(mx.zeros((4, 1)), (4, 2), Cut(1, ((1, 2),)))
    for first, second, said in [
        (whole, Piece(mx.zeros((4, 2), mx.float16), (4, 2)), "w is float16"),
        (rows, Piece(mx.zeros((2, 3)), (4, 3), Cut(0, ((2, 4),))), r"\[4, 3\] on rank 1"),
        (rows, columns, "w is cut along axis 0 and along axis 1"),
        (rows, Piece(mx.zeros((3, 2)), (4, 2), Cut(0, ((2, 4),))), r"rank 1 holds \[3, 2\]"),
        (Piece(mx.zeros((4,)), (4,), Cut(1, ((0, 4),))), whole, "w"),
    ]:
        with pytest.raises(IntegrityError, match=said):
            tabulate([{"w": describe(first)}, {"w": describe(second)}])


def test_copies_are_left_out_once():
    fresh, places = first_held(Cut(0, ((4, 8), (0, 6), (4, 8))), [(5, 6), (20, 30)])
    assert fresh.intervals == ((4, 5), (6, 8), (0, 4))
    assert places == [(0, 1), (2, 4), (4, 8)]


@pytest.mark.parametrize(
    "metrics, whole, last, best, gone",
    [
        ({1: None, 2: None, 3: None}, [1, 2, 3], 2, 1, {1}),
        ({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}, [1, 2, 3, 4], 2, 1, {2}),
        ({1: float("nan"), 2: 0.2, 3: 0.3, 4: 0.4}, [1, 2, 3, 4], 1, 1, {1}),
        ({1: 0.3, 2: 0.3, 3: None, 4: None}, [1, 2, 3, 4], 1, 1, {1}),
        ({1: None, 2: None, 3: None}, [1, 2, 3], 0, 0, {1}),
        ({1: None, 2: None, 3: None}, [3], 1, 0, set()),
        ({1: None, 2: None, 3: None, 4: None}, [1, 4], 1, 0, {2, 3}),
    ],
)
def test_what_is_kept(metrics, whole, last, best, gone):
    assert superfluous(metrics, whole, last, best) == gone


def test_chunks_are_a_mebibyte_at_most_and_even():
    for shape, dtype, chunk in [
        ((5,), np.float32, (5,)),
        ((1 << 19,), np.float32, (1 << 18,)),
        ((1000, 1024), np.float32, (250, 1024)),
        ((3, 1 << 20), np.float16, (1, 1 << 19)),
        ((2, 3, 4), np.uint8, (2, 3, 4)),
    ]:
        assert chunk_shape(np.empty(shape, dtype)) == chunk
