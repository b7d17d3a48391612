"""The sampler over real collectives: every layout draws and reports what one rank does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx import comm
from hpcmlx.inference.penalties import Context
from hpcmlx.inference.sampling import Sampler, SamplingParams
from hpcmlx.parallel.partition import offsets, split_by_weight

pytestmark = pytest.mark.mpi

VOCAB = 2003
SHARES = [(1, 1, 1, 1), (5, 1, 2, 1), (1, 3000, 1, 3000)]  # the last: a rank with one row
NUM_ROWS = 40
KINDS = [
    {},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 1.3, "top_p": 0.8, "logprobs": 0},
    {"temperature": 1.0, "min_p": 0.2, "frequency_penalty": 0.5},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 20, "logprobs": 20},
    {"logit_bias": ((0, 2.0), (1000, 9.0), (2002, -5.0)), "presence_penalty": 0.8},
    {"repetition_penalty": 0.9, "presence_penalty": -1.0, "logprobs": 5},
]


def rows(seed):
    """Logits, params and contexts of a step; some rows tie, some are broken."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(NUM_ROWS, VOCAB)).astype(np.float32) * 2
    logits[::5] = np.round(logits[::5])
    logits[7, 3], logits[8] = np.nan, -np.inf
    params = [SamplingParams(seed=i, **KINDS[i % len(KINDS)]) for i in range(NUM_ROWS)]
    contexts = []
    for p in params:
        prompt, answer = rng.integers(0, VOCAB, (2, 30)).tolist()
        contexts.append(Context(prompt, answer) if p.looks_back else None)
    return logits, params, contexts


def step(group, interval, logits, params, contexts):
    """(tokens, what is reported of them)."""
    sampler = Sampler(group, interval, VOCAB)
    local = mx.array(logits[:, slice(*interval)])
    tokens = sampler(local, params, [30] * len(params), contexts)
    pending = sampler.report(local, tokens, params)
    mx.eval(tokens, *(pending.arrays if pending else []))
    return tokens.tolist(), pending and pending.read()


@pytest.fixture(scope="module")
def group(world):
    return world.split(0, world.rank, graph=True)


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_tokens_and_reports_do_not_depend_on_the_layout(world, group, shares):
    intervals = offsets(split_by_weight(VOCAB, shares[: world.size], minimum=1))
    for seed in range(3):
        logits, params, contexts = rows(seed)
        tokens, entries = step(group, intervals[world.rank], logits, params, contexts)
        alone, expected = step(comm.Communicator(), (0, VOCAB), logits, params, contexts)
        assert tokens == alone
        assert [i for i, token in enumerate(tokens) if token < 0] == [7, 8]
        for row, (ours, twin) in enumerate(zip(entries, expected, strict=True)):
            assert (ours is None) == (twin is None) == (params[row].logprobs is None)
            if ours is None or tokens[row] < 0:
                continue
            assert ours.logprob == pytest.approx(twin.logprob, abs=1e-5)
            assert [token for token, _ in ours.top] == [token for token, _ in twin.top]
            assert len(ours.top) == params[row].logprobs
            np.testing.assert_allclose(
                [p for _, p in ours.top], [p for _, p in twin.top], rtol=0, atol=1e-5
            )
    world.barrier()


def test_a_batch_of_one_kind(world, group):
    """No row takes another's path: the collectives are fewer, and the same on every rank."""
    intervals = offsets(split_by_weight(VOCAB, (2, 1, 1, 3)[: world.size]))
    logits = rows(9)[0]
    for kind in KINDS:
        params = [SamplingParams(seed=i, **kind) for i in range(NUM_ROWS)]
        contexts = [Context([5, i], [i + 9] * 30) for i in range(NUM_ROWS)]
        ours = step(group, intervals[world.rank], logits, params, contexts)[0]
        alone = step(comm.Communicator(), (0, VOCAB), logits, params, contexts)[0]
        assert ours == alone, kind
    world.barrier()
