"""Penalties and bias against mlx-lm's processors and OpenAI's formula, on one rank and several."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from hpcmlx.comm import Communicator
from hpcmlx.inference.penalties import Context, adjust
from hpcmlx.inference.sampling import Sampler, SamplingParams

VOCAB = 60
WHOLE = 10**6  # mlx-lm's processors forget tokens that are further back


def rng(seed=5):
    return np.random.default_rng(seed)


def history(seed):
    """A prompt and an answer that share some tokens and repeat others."""
    return rng(seed).integers(0, 30, 25).tolist(), rng(seed + 1).integers(10, 40, 20).tolist()


def adjusted(logits, params, contexts, bounds=(0, VOCAB)):
    """What the ranks of a vocabulary cut at `bounds` hold, side by side."""
    parts = [
        np.array(adjust(mx.array(logits[:, start:stop]), params, contexts, start))
        for start, stop in pairwise(bounds)
    ]
    return np.concatenate(parts, axis=1)


def reference(logits, p, prompt, answer):
    """OpenAI's formula (mu - c * frequency - (c > 0) * presence) after the repetition penalty."""
    out = logits.astype(np.float64)
    for token in {*prompt, *answer}:
        out[token] *= p.repetition_penalty if out[token] < 0 else 1 / p.repetition_penalty
    for token, count in Counter(answer).items():
        out[token] -= count * p.frequency_penalty + p.presence_penalty
    for token, value in p.logit_bias:
        out[token] += value
    return out


PARAMS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.7),
    SamplingParams(frequency_penalty=0.4),
    SamplingParams(presence_penalty=-1.5),
    SamplingParams(frequency_penalty=-0.2, presence_penalty=0.9),
    SamplingParams(repetition_penalty=1.1, frequency_penalty=0.3, presence_penalty=0.5),
    SamplingParams(logit_bias=((3, -100.0), (59, 4.5))),
    SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((12, 7.0),)),
]


@pytest.mark.parametrize("bounds", [(0, 60), (0, 7, 60), (0, 41, 42, 60)], ids=str)
def test_the_changed_logits_are_those_of_the_formula(bounds):
    """The last two ranks of three hold no token that any row's past has."""
    logits = rng().normal(size=(len(PARAMS), VOCAB)).astype(np.float32) * 3
    pasts = [history(row) for row in range(len(PARAMS))]
    contexts = [
        Context(*past) if p.looks_back else None for p, past in zip(PARAMS, pasts, strict=True)
    ]
    ours = adjusted(logits, PARAMS, contexts, bounds)
    for row, (p, past) in enumerate(zip(PARAMS, pasts, strict=True)):
        expected = reference(logits[row], p, *past)
        np.testing.assert_allclose(ours[row], expected, rtol=0, atol=1e-5, err_msg=str(p))
        untouched = expected == logits[row].astype(np.float64)
        np.testing.assert_array_equal(ours[row][untouched], logits[row][untouched])
    np.testing.assert_array_equal(ours, adjusted(logits, PARAMS, contexts))


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"logit_bias": {4: -2.0, 44: 3.0}},
    ],
    ids=str,
)
def test_the_changed_logits_are_those_of_mlx_lm(params):
    """mlx-lm penalises the prompt like the answer: the same where only one of them matters."""
    prompt, answer = history(3)
    if "repetition_penalty" in params and len(params) == 1:
        past, context = prompt + answer, Context(prompt, answer)
    else:
        past, context = answer, Context([], answer)
    logits = rng().normal(size=(1, VOCAB)).astype(np.float32)
    expected = mx.array(logits)
    sizes = {f"{name.split('_')[0]}_context_size": WHOLE for name in params if "penalty" in name}
    for processor in make_logits_processors(**params, **sizes):
        expected = processor(past, expected)
    if "logit_bias" in params:
        params = {"logit_bias": tuple(params["logit_bias"].items())}
    ours = adjusted(logits, [SamplingParams(**params)], [context])
    np.testing.assert_allclose(ours, np.array(expected), rtol=0, atol=1e-6)
    assert np.abs(ours - logits).max() > 0.1


def test_a_bias_comes_after_the_penalties():
    logits = np.full((1, 4), 2.0, np.float32)
    params = [SamplingParams(repetition_penalty=2.0, logit_bias=((1, 10.0),))]
    assert adjusted(logits, params, [Context([1, 2], [])], (0, 4)).tolist() == [[2, 11, 1, 2]]


def test_a_context_counts_on_as_the_answer_grows():
    prompt, answer = [1, 2, 2, 9], []
    context = Context(prompt, answer)
    for token in rng().integers(0, 500, 400).tolist() + [2] * 3:
        answer.append(token)
        ids, counts = context.counts()
        assert len(set(ids.tolist())) == len(ids)
        expected = Counter(answer)
        assert {t: c for t, c in zip(ids.tolist(), counts.tolist(), strict=True) if c} == expected
        assert set(prompt) <= set(ids.tolist())
    assert context.counts()[0].tolist() == ids.tolist()  # asking twice changes nothing


def test_rows_that_ask_for_nothing_cost_nothing():
    logits = mx.array(rng().normal(size=(2, 8)).astype(np.float32))
    assert adjust(logits, [SamplingParams(), SamplingParams(temperature=1.0)], None, 0) is logits
    # A rank that holds none of the tokens leaves its logits alone.
    params = [SamplingParams(presence_penalty=1.0, logit_bias=((3, 1.0),))] * 2
    assert adjust(logits, params, [Context([], [1]), Context([], [2])], 100) is logits


def sample(logits, params, contexts=None, positions=None):
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    sampler = Sampler(Communicator(), (0, logits.shape[1]), logits.shape[1])
    return sampler(mx.array(logits), params, positions or [0] * len(logits), contexts).tolist()


def test_the_sampled_token_follows_the_changed_logits():
    logits = [[3.0, 2.0, 1.0, 0.0]] * 3
    params = [
        SamplingParams(presence_penalty=1.5),
        SamplingParams(),
        SamplingParams(logit_bias=((3, 9.0),)),
    ]
    assert sample(logits, params, [Context([], [0]), None, None], [1, 0, 0]) == [1, 0, 3]


def test_truncation_looks_at_the_changed_logits():
    """Without the penalty token 0 alone would be kept."""
    logits = [[9.0, 4.0, 3.9, 0.0]]
    for kind in ({"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}):
        params = SamplingParams(temperature=1.0, frequency_penalty=10.0, **kind)
        seeds = [
            SamplingParams(temperature=1.0, frequency_penalty=10.0, seed=s, **kind)
            for s in range(40)
        ]
        contexts = [Context([], [0])] * len(seeds)
        tokens = sample(logits * len(seeds), seeds, contexts, [1] * len(seeds))
        assert set(tokens) == {1, 2}, params


def test_a_missing_or_outdated_context_is_refused():
    params = [SamplingParams(repetition_penalty=1.2)]
    for contexts in (None, [None]):
        with pytest.raises(ValueError, match="row 0 has a penalty but no context"):
            sample([1.0, 2.0], params, contexts)
    with pytest.raises(ValueError, match="has 1 tokens, its row generated 2"):
        sample([1.0, 2.0], params, [Context([1], [0])], [2])
