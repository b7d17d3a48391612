"""Log-probabilities and largest logits against float64 and plain sorting, on one rank or more."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.comm import Communicator
from hpcmlx.inference.logprobs import (
    TokenLogprobs,
    gather_largest,
    largest,
    logsumexp,
    merge_largest,
)
from hpcmlx.inference.sampling import Sampler, SamplingParams
from tests.test_sampling import Gathering
from tests.test_tensor import on_ranks


def rng(seed=7):
    return np.random.default_rng(seed)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def report(logits, tokens, asked, bounds=None):
    """What every rank of a vocabulary cut at `bounds` reads."""
    bounds = bounds or (0, logits.shape[1])
    params = [SamplingParams(logprobs=number) for number in asked]

    def body(group):
        group = Gathering(group.rank, group.size, group._barrier, group._box)
        start, stop = list(pairwise(bounds))[group.rank]
        sampler = Sampler(group, (start, stop), bounds[-1])
        pending = sampler.report(mx.array(logits[:, start:stop]), mx.array(tokens), params)
        return pending and pending.read()

    results = on_ranks(len(bounds) - 1, body)
    assert all(result == results[0] for result in results)
    return results[0]


def test_logsumexp_of_a_large_vocabulary_is_exact():
    """mx.logsumexp itself is off by 1e-4 and more."""
    logits = (rng().normal(size=(4, 151936)) * 2.5).astype(np.float32)
    expected = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    ours = logsumexp(mx.array(logits), Communicator())
    np.testing.assert_allclose(np.array(ours), expected, rtol=0, atol=5e-6)


# -- the largest logits --


def by_sorting(logits, count):
    order = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits))
    return order[:, :count]


@pytest.mark.parametrize("width", [5, 64, 1000, 5003])
@pytest.mark.parametrize("distinct", [2, 40, None])
def test_the_largest_are_those_of_a_stable_sort(width, distinct):
    """Few distinct values (as bfloat16 logits have) tie at the edge of every block."""
    logits = rng().normal(size=(6, width)).astype(np.float32)
    if distinct:
        logits = (rng().integers(0, distinct, logits.shape) - distinct // 2).astype(np.float32)
        logits[0, ::3] *= -1  # zeros of both signs are equal
    logits[1, : width // 2] = -np.inf
    for count in (1, 3, 20, 64, 600, width):
        values, ids = largest(mx.array(logits), count)
        np.testing.assert_array_equal(
            np.sort(np.array(ids)), np.sort(by_sorting(logits, count)), err_msg=str(count)
        )
        np.testing.assert_array_equal(
            np.array(values), np.take_along_axis(logits, np.array(ids).astype(int), 1)
        )


def test_a_nan_is_among_the_largest():
    for nan in (np.float32(np.nan), -np.float32(np.nan)):  # its sign bit is not to matter
        logits = rng().normal(size=(3, 4000)).astype(np.float32)
        logits[[0, 1, 2], [0, 1234, 3999]] = nan
        values, _ids = largest(mx.array(logits), 3)
        assert np.isnan(np.array(values)).sum(axis=1).tolist() == [1, 1, 1]
        merged, ids = merge_largest(
            np.array(gather_largest(mx.array(logits), 3, 0, Communicator())), 3
        )
        assert ids[:, 0].tolist() == [0, 1234, 3999] and np.isnan(merged[:, 0]).all()


# -- reports --


@pytest.mark.parametrize("bounds", [(0, 300), (0, 100, 300), (0, 3, 299, 300)], ids=str)
def test_a_report_says_what_the_softmax_says(bounds):
    logits = (rng().normal(size=(5, 300)) * 3).astype(np.float32)
    tokens = np.array([0, 299, 150, 7, 100], np.int32)
    entries = report(logits, tokens, [4, None, 0, 20, 7], bounds)
    assert entries[1] is None
    expected = log_softmax(logits)
    for row, number in ((0, 4), (2, 0), (3, 20), (4, 7)):
        entry = entries[row]
        assert entry.logprob == pytest.approx(expected[row, tokens[row]], abs=1e-5)
        assert [token for token, _ in entry.top] == np.argsort(-expected[row])[:number].tolist()
        for token, logprob in entry.top:
            assert logprob == pytest.approx(expected[row, token], abs=1e-5)


@pytest.mark.parametrize("bounds", [(0, 90), (0, 30, 90), (0, 2, 3, 90)], ids=str)
def test_of_equally_likely_tokens_the_lower_ids_are_told(bounds):
    logits = np.zeros((2, 90), np.float32)
    logits[1, 40:] = 1
    entries = report(logits, np.array([89, 89], np.int32), [5, 5], bounds)
    assert [token for token, _ in entries[0].top] == [0, 1, 2, 3, 4]
    assert [token for token, _ in entries[1].top] == [40, 41, 42, 43, 44]
    assert entries[0].logprob == pytest.approx(-np.log(90), abs=1e-6)


def test_more_than_the_vocabulary_is_all_of_it():
    entry = report(np.array([[0.0, 1.0, 2.0]], np.float32), np.array([1], np.int32), [20])[0]
    assert [token for token, _ in entry.top] == [2, 1, 0]


def test_the_report_is_of_the_model_not_of_the_sampling():
    logits = rng().normal(size=(1, 50)).astype(np.float32)
    sampler = Sampler(Communicator(), (0, 50), 50)
    params = [SamplingParams(temperature=3.0, top_k=2, logit_bias=((9, 99.0),), logprobs=1, seed=1)]
    tokens = sampler(mx.array(logits), params, [0])
    assert tokens.tolist() == [9]
    (entry,) = sampler.report(mx.array(logits), tokens, params).read()
    expected = log_softmax(logits)[0]
    assert entry.logprob == pytest.approx(expected[9], abs=1e-5)
    assert entry.top[0][0] == int(logits[0].argmax())


def test_a_certain_token_has_no_logprob_above_zero():
    entries = report(np.array([[200.0, -50.0, 3.0]], np.float32), np.array([0], np.int32), [1])
    assert entries == [TokenLogprobs(0.0, ((0, 0.0),))]


def test_half_precision_logits_are_widened_first():
    logits = mx.array(rng().normal(size=(1, 40)) * 4).astype(mx.bfloat16)
    wide = np.array(logits.astype(mx.float32))
    entry = (
        Sampler(Communicator(), (0, 40), 40)
        .report(logits, mx.array([3]), [SamplingParams(logprobs=2)])
        .read()[0]
    )
    assert entry.logprob == pytest.approx(log_softmax(wide)[0, 3], abs=1e-5)


class Silent:
    """A group of two whose collectives must not be called."""

    size = 2


def test_where_no_row_asks_nothing_is_computed():
    sampler = Sampler(Silent(), (0, 10), 20)
    logits = mx.zeros((2, 10))
    assert sampler.report(logits, mx.array([1, 2]), [SamplingParams()] * 2) is None
