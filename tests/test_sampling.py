"""Sampling against mlx-lm's own truncation, against the softmax, and over a split vocabulary."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from hpcmlx.comm import Communicator
from hpcmlx.inference.penalties import Context
from hpcmlx.inference.sampling import (
    Sampler,
    SamplingParams,
    noise_keys,
    row_seed,
    uniform_at,
)
from tests.test_tensor import ThreadGroup, on_ranks


def rng(seed=3):
    return np.random.default_rng(seed)


def draw(logits, params, positions, vocab=None):
    """Tokens of rows of logits on one rank."""
    logits = np.atleast_2d(np.ascontiguousarray(logits, np.float32))
    sampler = Sampler(Communicator(), (0, logits.shape[-1]), vocab or logits.shape[-1])
    return sampler(mx.array(logits), params, positions).tolist()


def draws(logits, number, **params):
    """`number` draws of one row: positions 0, 1, …"""
    logits = np.broadcast_to(np.asarray(logits, np.float32), (number, len(logits)))
    return np.array(draw(logits, [SamplingParams(**params)] * number, range(number)))


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


# -- greedy --


def test_greedy_takes_the_best_and_of_equals_the_first():
    logits = np.array([[0, 3, 1, 3], [5, 5, 5, 5], [-1, -2, -9, -0.5]])
    assert draw(logits, [SamplingParams()] * 3, [0, 1, 2]) == [1, 0, 3]


class Gathering(ThreadGroup):
    """A thread's group with all_gather too."""

    def all_gather(self, x: mx.array) -> mx.array:
        self._box[self.rank] = np.array(x)
        self._barrier.wait()
        result = mx.array(np.concatenate(self._box))
        self._barrier.wait()
        return result


def split_draw(logits, params, positions, bounds):
    """What every rank of a vocabulary cut at `bounds` says."""

    def body(group: ThreadGroup) -> list[int]:
        group = Gathering(group.rank, group.size, group._barrier, group._box)
        start, stop = list(pairwise(bounds))[group.rank]
        sampler = Sampler(group, (start, stop), bounds[-1])
        tokens = sampler(mx.array(logits[:, start:stop]), params, positions)
        return tokens.tolist()

    return on_ranks(len(bounds) - 1, body)


@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 1, 2, 4), (0, 3, 4)])
def test_greedy_ties_over_ranks_go_to_the_lower_id(bounds):
    logits = np.array([[0, 3, 1, 3], [5, 5, 5, 5], [1, 0, 2, 2]], np.float32)
    for tokens in split_draw(logits, [SamplingParams()] * 3, [0] * 3, bounds):
        assert tokens == [1, 0, 2]


# -- temperature --


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = rng().normal(size=12)
    number = 6000
    tokens = draws(logits, number, temperature=temperature, seed=1)
    expected = softmax(logits / temperature) * number
    chi_square = ((np.bincount(tokens, minlength=12) - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 11 degrees of freedom: 1 in 1000


def test_draws_of_a_truncated_row_follow_the_rest_of_the_softmax():
    logits = np.log([0.4, 0.3, 0.2, 0.06, 0.04])
    number = 4000
    tokens = draws(logits, number, temperature=1.0, top_k=3, seed=2)
    counts = np.bincount(tokens, minlength=5)
    assert counts[3:].sum() == 0
    np.testing.assert_allclose(counts[:3] / number, np.array([4, 3, 2]) / 9, atol=0.025)


def test_draws_are_a_function_of_seed_and_position():
    logits = rng().normal(size=50) * 0.1
    first = draws(logits, 40, temperature=1.0, seed=1)
    assert (first == draws(logits, 40, temperature=1.0, seed=1)).all()
    assert (first != draws(logits, 40, temperature=1.0, seed=2)).any()
    assert len(set(first)) > 10  # positions differ
    params = [SamplingParams(seed=s) for s in (0, 1, -1, 2**64) for _ in range(9)]
    keys = noise_keys(params, [*range(9)] * 4)
    assert len({tuple(key) for key in keys.tolist()}) == 36
    assert (keys[9:18] == noise_keys(params[9:18], range(9))).all()
    assert len({row_seed(s, i) for s in range(4) for i in range(4)}) == 16


def test_noise_at_some_tokens_is_that_of_all():
    """MLX has no way to ask for a part of its random numbers, so this one is our own."""
    for vocab in (1, 2, 7, 1000, 1001):
        keys = noise_keys([SamplingParams(seed=s) for s in range(3)], [4, 5, 6])
        ids = rng().integers(0, vocab, (3, 50))
        for key, row, draws in zip(keys, ids, uniform_at(keys, ids, vocab), strict=True):
            whole = mx.random.uniform(shape=(vocab,), key=mx.array(key))
            assert (draws == whole[mx.array(row)]).all()


KINDS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 20, "min_p": 0.01},
    {"temperature": 1.1, "top_k": 90},
]


# What version 0.1.0 drew: a seed in somebody's job means these tokens.
GOLDEN = {
    1001: [276, 959, 316, 678, 703, 556, 229, 708, 182, 559, 709, 532, 869, 784]
    + [209, 610, 523, 342, 904, 393, 397, 916, 91, 427, 878, 647, 58, 786],
    5000: [1681, 431, 73, 2620, 3474, 1464, 3814, 4643, 2480, 1281, 449, 1631, 1525, 4235]
    + [462, 2221, 1067, 1523, 1934, 4146, 4619, 4133, 2804, 2222, 4966, 1698, 323, 136],
}


@pytest.mark.parametrize("vocab", GOLDEN)
def test_draws_stay_what_they_were(vocab):
    rows = 4 * len(KINDS)
    logits = rng(vocab).normal(size=(rows, vocab)).astype(np.float32) * 2
    params = [SamplingParams(**KINDS[i % len(KINDS)], seed=i * 2**40) for i in range(rows)]
    assert draw(logits, params, [7 * i for i in range(rows)]) == GOLDEN[vocab]


def test_a_row_does_not_depend_on_its_neighbours():
    logits = rng().normal(size=(len(KINDS), 100)).astype(np.float32) * 2
    params = [SamplingParams(**kind, seed=i) for i, kind in enumerate(KINDS)]
    positions = list(range(10, 10 + len(KINDS)))
    together = draw(logits, params, positions)
    alone = [draw(logits[i], [params[i]], [positions[i]])[0] for i in range(len(KINDS))]
    backwards = draw(logits[::-1], params[::-1], positions[::-1])[::-1]
    assert together == alone == backwards


# -- truncation --


def kept(logits, **params):
    """The tokens that a row may draw: those that `Sampler` does not put to -inf."""
    p = SamplingParams(temperature=1.0, **params)
    array = mx.array(np.atleast_2d(logits).astype(np.float32))
    sampler = Sampler(Communicator(), (0, array.shape[-1]), array.shape[-1])
    ((rows, values, ids),) = sampler._kept(array, [p])
    assert rows.tolist() == [0]
    np.testing.assert_array_equal(
        np.array(array)[0, ids[values > -np.inf]], values[values > -np.inf]
    )
    return set(ids[values > -np.inf].tolist())


def kept_by_mlx_lm(logits, top_p=1.0, min_p=0.0, top_k=0):
    """What is left of mlx-lm's chain: top-p, then min-p, then top-k."""
    logprobs = mx.array(np.atleast_2d(logits).astype(np.float32))
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    if top_p < 1:
        logprobs = apply_top_p(logprobs, top_p)
    if min_p:
        logprobs = apply_min_p(logprobs, min_p)
    if top_k:
        logprobs = apply_top_k(logprobs, top_k)
    return set(np.flatnonzero(np.array(logprobs[0]) > -np.inf))


TRUNCATIONS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 70},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.93},
    {"min_p": 0.05},
    {"min_p": 0.6},
    {"top_p": 0.9, "top_k": 5},
    {"top_p": 0.3, "top_k": 60},
    {"top_p": 0.9, "min_p": 0.1},
    {"min_p": 0.02, "top_k": 12},
    {"top_p": 0.95, "min_p": 0.03, "top_k": 30},
]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_the_kept_tokens_are_those_of_mlx_lm(truncation):
    for spread in (1.0, 2.0, 4.0):
        logits = rng(int(spread)).normal(size=200) * spread
        ours = kept(logits, **truncation)
        assert ours == kept_by_mlx_lm(logits, **truncation)
        assert 0 < len(ours) < 200


def test_no_truncation_keeps_everything():
    assert kept(rng().normal(size=30)) == set(range(30))
    assert kept(rng().normal(size=30), top_k=30) == set(range(30))
    assert kept(rng().normal(size=30), top_k=500) == set(range(30))
    assert kept(rng().normal(size=3000), top_p=1 - 1e-9) == set(range(3000))


def test_tokens_as_likely_as_the_last_one_kept_are_kept_too():
    """mlx-lm keeps k of them in an arbitrary order; here no rank count may decide which."""
    assert kept([1, 3, 2, 2, 2, 0], top_k=2) == {1, 2, 3, 4}
    assert kept([0, 0, 0, 0], top_p=0.3) == {0, 1, 2, 3}
    assert kept([2, 2, 1], min_p=1.0) == {0, 1}
    for ties in (64, 65, 700):  # more than the candidates that are asked for first
        logits = np.r_[np.zeros(300), np.ones(ties), np.zeros(300)]
        for truncation in ({"top_k": 2}, {"top_k": 64}, {"top_p": 0.1}, {"min_p": 0.9}):
            assert kept(logits, **truncation) == set(range(300, 300 + ties)), truncation


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_a_flat_distribution_needs_many_candidates(spread):
    """The nucleus reaches far beyond the first 64 candidates, then beyond 512 and 4096."""
    logits = rng().normal(size=5000) * spread + rng().permutation(5000) * 1e-5
    for top_p in (0.05, 0.5, 0.999):
        ours = kept(logits, top_p=top_p)
        order = np.argsort(-logits.astype(np.float32), kind="stable")
        mass = np.cumsum(softmax(logits)[order])
        size = int(np.searchsorted(mass, top_p)) + 1
        # Float32 sums of 5000 terms: mlx-lm's own set is as near.
        assert abs(len(ours) - size) <= 3
        assert set(order[: min(size, len(ours)) - 3]) <= ours
    assert len(kept(logits, top_p=0.999, top_k=10)) == 10


# -- a vocabulary over ranks --


@pytest.mark.parametrize("bounds", [(0, 50, 100), (0, 3, 100), (0, 90, 91, 100)], ids=str)
def test_a_split_vocabulary_gives_the_same_tokens(bounds):
    """Also where a rank has fewer rows than top-k asks for."""
    rows = 4 * len(KINDS)
    logits = rng().normal(size=(rows, 100)).astype(np.float32)
    params = [SamplingParams(**KINDS[i % len(KINDS)], seed=i) for i in range(rows)]
    positions = [i * i for i in range(rows)]
    expected = draw(logits, params, positions)
    for tokens in split_draw(logits, params, positions, bounds):
        assert tokens == expected


def test_a_split_flat_vocabulary():
    logits = (rng().normal(size=(3, 5000)) * 0.01).astype(np.float32)
    params = [
        SamplingParams(temperature=1.0, top_p=p, seed=i) for i, p in enumerate((0.5, 0.9, 0.999))
    ]
    expected = draw(logits, params, [0, 1, 2])
    for tokens in split_draw(logits, params, [0, 1, 2], (0, 100, 5000)):
        assert tokens == expected


def test_half_precision_logits():
    logits = mx.array(rng().normal(size=(2, 40))).astype(mx.bfloat16)
    sampler = Sampler(Communicator(), (0, 40), 40)
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=1), SamplingParams()]
    wide = sampler(logits.astype(mx.float32), params, [0, 0]).tolist()
    assert sampler(logits, params, [0, 0]).tolist() == wide


# -- rows without anything to sample from --


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bounds", [(0, 100), (0, 30, 100), (0, 1, 2, 100)], ids=str)
def test_a_row_that_is_not_finite_gets_no_token(kind, bounds):
    """Wherever the NaN is, and whatever rank holds it; its neighbours are not concerned."""
    logits = rng().normal(size=(7, 100)).astype(np.float32)
    params = [SamplingParams(**kind, seed=i) for i in range(7)]
    good = draw(logits, params, range(7))
    logits[0] = np.nan
    logits[1, 99] = np.nan
    logits[2, 0] = -np.float32(np.nan)
    logits[3] = -np.inf
    logits[4, 57] = np.inf
    logits[5, :99] = -np.inf
    for tokens in split_draw(logits, params, range(7), bounds):
        assert tokens == [-1, -1, -1, -1, -1, 99, good[6]]


def test_a_nan_survives_penalties_and_bias():
    logits = np.zeros((1, 9), np.float32)
    logits[0, 4] = np.nan
    for p in (
        SamplingParams(logit_bias=((4, -100.0),)),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(presence_penalty=1.0, temperature=1.0, top_k=2),
    ):
        sampler = Sampler(Communicator(), (0, 9), 9)
        assert sampler(mx.array(logits), [p], [1], [Context([4], [4])]).tolist() == [-1]


def test_the_only_token_kept_is_drawn_whatever_its_noise():
    """Under this key the word of this token is 0 (found by running the hash backwards); a draw of 0
    would be a noise of -inf, and the row would look like one without a finite logit."""
    draw_of_zero = uniform_at(np.array([[1, 2]], np.uint32), np.array([[235501135]]), 862751890)
    assert 0 < draw_of_zero.item() < 1e-30
    assert np.isfinite(mx.log(-mx.log(draw_of_zero)).item())
