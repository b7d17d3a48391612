"""Batches: nothing lost or twice, the same in every layout, padded little, resumed anywhere."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from hpcmlx.errors import ConfigError
from hpcmlx.training.data.batches import Batches, Rows, collate, deal
from hpcmlx.training.data.examples import Sample
from hpcmlx.training.data.order import pack, permutation

SEEDS = range(6)


def some_lengths(seed: int, count: int = 61, longest: int = 40) -> np.ndarray:
    """Many short ones and a few long ones, as in data of conversations."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.geometric(0.1, count) + 1, 2, longest).astype(np.int32)


def make(lengths: np.ndarray, **settings) -> Batches:
    given = {"seed": 0, "global_batch_size": 6, "micro_batch_size": 2, "max_length": 40}
    given |= {"num_epochs": 1, "pad_to": 8} | settings
    if "num_steps" in settings:
        del given["num_epochs"]
    return Batches(lengths, lengths - 1, **given)


def stream(batches: Batches) -> list[int]:
    """The examples of all steps in order."""
    return list(chain.from_iterable(batches.step(n).ids for n in range(batches.num_steps)))


def counts(ids: list[int], num: int) -> list[int]:
    return np.bincount(ids, minlength=num).tolist()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_epoch_has_every_example_once(seed, packing):
    lengths = some_lengths(seed)
    num = len(lengths)
    for batch in (1, 4, 7, 61, 100):  # that divide it, that do not, and more than there are
        ids = stream(
            make(lengths, seed=seed, global_batch_size=batch, num_epochs=3, packing=packing)
        )
        assert len(ids) == 3 * num
        epochs = [ids[i * num : (i + 1) * num] for i in range(3)]
        assert all(counts(epoch, num) == [1] * num for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_layout_changes_nothing_but_who_gets_what(seed, packing):
    lengths = some_lengths(seed)
    wanted = None
    for dp in (1, 2, 3):
        for micro in (1, 2, 4):
            batches = make(lengths, seed=seed, dp=dp, micro_batch_size=micro, packing=packing)
            steps = [batches.step(n) for n in range(batches.num_steps)]
            found = [(step.ids, step.num_targets, step.epoch) for step in steps]
            wanted = wanted or found
            assert found == wanted
            for step in steps:
                assert len(step.microbatches) == dp
                assert len({len(replica) for replica in step.microbatches}) == 1
                dealt = [rows for replica in step.microbatches for rows in replica]
                assert sorted(chain.from_iterable(r.ids for r in dealt)) == sorted(step.ids)
                assert all(1 <= len(rows.rows) <= micro for rows in dealt)
                # No row of padding but where a microbatch would have none at all.
                assert all(len(rows.rows) == 1 for rows in dealt if () in rows.rows)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_goes_on_anywhere(packing):
    lengths = some_lengths(0)
    whole = make(lengths, num_epochs=4, packing=packing)
    steps = [whole.step(n) for n in range(whole.num_steps)]
    for n in np.random.default_rng(0).permutation(whole.num_steps)[:12].tolist():
        assert make(lengths, num_epochs=4, packing=packing).step(n) == steps[n]
        # Steps are those of the stream, however long the run is.
        if n < whole.num_steps - 1:
            assert make(lengths, num_steps=n + 1, packing=packing).step(n) == steps[n]
    assert make(lengths, num_epochs=4, packing=packing, seed=1).step(0) != steps[0]


def test_the_last_batch_has_what_is_left():
    batches = make(some_lengths(0, 20), num_epochs=2, dp=2)
    sizes = [len(batches.step(n).ids) for n in range(batches.num_steps)]
    assert sizes == [6, 6, 6, 6, 6, 6, 4]
    assert [batches.step(n).epoch for n in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(IndexError, match="step 7 of 7"):
        batches.step(7)
    steps = make(some_lengths(0, 20), num_steps=9)
    assert [len(steps.step(n).ids) for n in range(9)] == [6] * 9


def test_replicas_without_rows_get_padding():
    batches = make(some_lengths(0, 7), dp=3, micro_batch_size=1, global_batch_size=6)
    (first,), (second,), (third,) = batches.step(1).microbatches
    assert len(first.rows[0]) == 1
    assert second == third == Rows(rows=((),), length=8)
    empty = collate({}, second)
    assert empty.tokens.shape == (1, 8) and not np.array(empty.targets).any() and empty.ids == ()


def test_rows_are_no_longer_than_need_be():
    lengths = some_lengths(3)
    for pad_to in (1, 8, 32, 64):
        batches = make(lengths, pad_to=pad_to, max_length=44)
        for step in map(batches.step, range(batches.num_steps)):
            for rows in step.microbatches[0]:
                longest = max(lengths[i] for i in rows.ids)
                assert longest <= rows.length <= 44
                assert rows.length % pad_to == 0 or rows.length == 44
                assert rows.length < longest + pad_to


def test_examples_of_a_batch_are_of_similar_lengths():
    lengths = some_lengths(0, 2000)

    def padding(batches: Batches) -> float:
        steps = [batches.step(n) for n in range(batches.num_steps)]
        rows = [rows for step in steps for replica in step.microbatches for rows in replica]
        return sum(r.shape[0] * r.shape[1] for r in rows) / lengths.sum() - 1

    sorted_ones = make(lengths, global_batch_size=8, micro_batch_size=8, pad_to=1)
    order = permutation(len(lengths), 0).reshape(-1, 8)
    shuffled = (lengths[order].max(1) * 8).sum() / lengths.sum() - 1
    assert padding(sorted_ones) < 0.1 < 0.5 < shuffled
    # Yet long and short batches alternate at random.
    means = [lengths[list(sorted_ones.step(n).ids)].mean() for n in range(250)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_replicas_have_about_as_much_to_do():
    lengths = some_lengths(0, 64, longest=400).tolist()
    dealt = deal(lengths, 4, 2)
    assert sorted(chain.from_iterable(chain.from_iterable(dealt))) == list(range(64))
    loads = [sum(len(g) * max(lengths[i] for i in g) for g in replica) for replica in dealt]
    assert max(loads) < 1.05 * min(loads)


@pytest.mark.parametrize("seed", SEEDS)
def test_packing_fills_rows(seed):
    lengths = some_lengths(seed, 300).tolist()
    rows = pack(lengths, 40)
    assert sorted(chain.from_iterable(rows)) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert len(rows) <= 1.02 * sum(lengths) / 40 + 1
    assert pack([5, 5, 5], 5) == [[0], [1], [2]] and pack([], 5) == []


def test_packed_rows_keep_examples_apart():
    lengths = np.array([3, 2, 4], np.int32)
    samples = [
        Sample(np.arange(n, dtype=np.int32) + 10 * (i + 1), np.arange(n) > 0)
        for i, n in enumerate(lengths)
    ]
    batches = make(lengths, packing=True, max_length=6, pad_to=4, global_batch_size=2)
    step = batches.step(0)
    assert step.num_targets == 6 and sorted(step.ids) == [0, 1, 2]
    (rows,) = step.microbatches[0]
    assert rows.shape == (2, 6)  # the next multiple of 4 would be above max_length
    batch = collate(samples, rows)
    full = rows.rows.index((2, 1))  # the row of 4 + 2 tokens
    for values, wanted, other in (
        (batch.tokens, [30, 31, 32, 33, 20, 21], [10, 11, 12, 0, 0, 0]),
        (batch.targets, [0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]),
        (batch.segments, [1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]),
    ):
        assert np.array(values)[[full, 1 - full]].tolist() == [wanted, other]
    assert batch.ids == rows.ids and collate(samples, Rows(((0,),), 3)).segments is None


def test_orders_do_not_change_with_numpy():
    assert permutation(10, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert permutation(10, 1, 2, 3).tolist() == [8, 1, 9, 3, 7, 5, 2, 0, 4, 6]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"global_batch_size": 0}, "global_batch_size=0 must be at least 1"),
        ({"dp": -1}, "dp=-1"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"num_epochs": 1, "num_steps": 1}, "either num_epochs or num_steps"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"max_length": 39}, "an example has 40 tokens, more than max_length=39"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    lengths = np.array([2, 40], np.int32)
    given = {"seed": 0, "global_batch_size": 1, "micro_batch_size": 1, "max_length": 40}
    if "num_steps" not in settings:
        given["num_epochs"] = 1
    with pytest.raises(ConfigError, match=message):
        Batches(lengths, lengths, **given | settings)
    with pytest.raises(ConfigError, match="no examples"):
        make(lengths[:0])
