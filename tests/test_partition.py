"""Index arithmetic of every split."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hpcmlx.parallel.partition import (
    Cut,
    merge,
    offsets,
    split_aligned,
    split_by_weight,
    split_heads,
)

WEIGHTS = [(1, 1), (2, 1), (1, 1, 1), (3, 1, 2), (1, 1, 1, 1), (0.2, 5, 1, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_units", [4, 5, 9, 32, 101])
@pytest.mark.parametrize("minimum", [0, 1])
def test_split_by_weight_deals_everything_near_the_exact_shares(num_units, weights, minimum):
    counts = split_by_weight(num_units, weights, minimum)
    assert sum(counts) == num_units
    assert min(counts) >= minimum
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - num_units * weight / sum(weights)) < 1 + minimum * len(weights)


def test_split_by_weight_by_hand():
    assert split_by_weight(9, (2, 1)) == [6, 3]
    assert split_by_weight(3, (1, 1)) == [2, 1]
    assert split_by_weight(4, (100, 1, 1), minimum=1) == [2, 1, 1]
    assert split_by_weight(0, (1, 1)) == [0, 0]


@pytest.mark.parametrize(
    ("args", "message"),
    [((3, (1, 0)), "positive"), ((3, (1, -1)), "positive"), ((3, (1,) * 4, 1), "3 units")],
)
def test_split_by_weight_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        split_by_weight(*args)


def test_offsets():
    assert offsets([2, 0, 3]) == [(0, 2), (2, 2), (2, 5)]


def test_merge_joins_what_touches_and_keeps_order_and_repeats():
    assert merge([(0, 2), (2, 4), (4, 4), (8, 9)]) == ((0, 4), (8, 9))
    assert merge([(2, 4), (2, 4), (0, 2)]) == ((2, 4), (2, 4), (0, 2))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("length", "quantum"), [(96, 1), (96, 16), (101, 1), (100, 16), (128, 32)])
def test_split_aligned_covers_at_quanta(length, quantum, weights):
    intervals = split_aligned(length, quantum, weights)
    assert intervals[0][0] == 0
    assert intervals[-1][1] == length
    for (start, stop), (following, _) in pairwise(intervals):
        assert start < stop == following
        assert stop % quantum == 0


def test_split_aligned_refuses_fewer_quanta_than_ranks():
    with pytest.raises(ValueError, match="2 units"):
        split_aligned(64, 32, (1, 1, 1))


HEADS = [(9, 3), (6, 3), (4, 4), (8, 1), (8, 2), (64, 8), (12, 12)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("num_query", "num_key_value"), HEADS)
@pytest.mark.parametrize("quantum", [1, 2])
def test_every_query_head_finds_its_key_value_head(num_query, num_key_value, weights, quantum):
    if -(-num_query // quantum) < len(weights):
        with pytest.raises(ValueError, match="units"):
            split_heads(num_query, num_key_value, weights, quantum)
        return
    shares = split_heads(num_query, num_key_value, weights, quantum)
    dealt = [head for share in shares for head in range(*share.query)]
    assert dealt == list(range(num_query))
    for share in shares:
        assert share.query[0] % quantum == 0
        assert share.num_query > 0
        # As grouped-query attention pairs them on one rank, and in the whole model.
        local, rest = divmod(share.num_query, len(share.key_value))
        assert rest == 0
        for i, head in enumerate(range(*share.query)):
            assert share.key_value[i // local] == head // (num_query // num_key_value)


def test_split_heads_keeps_groups_whole_while_there_are_enough():
    held = [share.key_value for share in split_heads(9, 3, (1, 1))]
    assert held == [(0, 1), (2,)]
    assert [s.query for s in split_heads(9, 3, (1, 1, 1))] == [(0, 3), (3, 6), (6, 9)]


def test_split_heads_replicates_key_value_heads_beyond_them():
    shares = split_heads(9, 3, (1, 1, 1, 1))
    assert [share.query for share in shares] == [(0, 3), (3, 5), (5, 7), (7, 9)]
    assert [share.key_value for share in shares] == [(0,), (1,), (1, 2), (2,)]


def test_split_heads_repeats_where_query_heads_fall_unevenly():
    assert split_heads(6, 2, (1, 2))[1].key_value == (1,)
    assert split_heads(6, 2, (1, 4, 1))[1].key_value == (0, 1)
    assert split_heads(9, 3, (1, 7, 1, 1))[1].key_value == (0, 0, 1, 1, 1, 2)


def test_cut_of_packed_tensors():
    cut = Cut(1, ((64, 96), (128, 192)))
    assert cut.size == 96
    assert cut.shape((7, 256)) == (7, 96)
    assert cut.scaled(4, 32) == Cut(1, ((8, 12), (16, 24)))  # 4 bits in words of 32
    assert cut.scaled(1, 32) == Cut(1, ((2, 3), (4, 6)))
    with pytest.raises(ValueError, match="multiple of 128"):
        cut.scaled(1, 128)
