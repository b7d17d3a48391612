"""Rows of any lengths, padded together, cost what mlx-lm's model says of each one alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.errors import InputError, IntegrityError
from hpcmlx.inference import scoring
from hpcmlx.inference.scoring import Score, ScoreRow, score
from tests import tiny_configs
from tests.test_engine import MESH, loaded
from tests.twin import LOGPROB_TOLERANCE, twin_logprobs

rng = np.random.default_rng(5)
# Longer than every sliding window of the tiny models (4), and as uneven as can be.
ROWS = [
    ScoreRow(rng.integers(0, 90, length).tolist(), start)
    for length, start in [(2, 1), (40, 1), (3, 2), (17, 9), (17, 16), (33, 2), (5, 1), (24, 23)]
]
# Attention, sliding windows, experts, states, hybrids, latent attention.
MODELS = ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "mamba2", "falcon_h1", "deepseek_v3"]


class Half:
    """One of two tensor-parallel ranks whose partner's arrays are known."""

    size = 2

    def __init__(self, first: bool, partner: list[mx.array]):
        self.first, self.partner = first, partner
        self.seen: list[mx.array] = []

    def all_gather(self, x: mx.array) -> mx.array:
        self.seen.append(x)
        other = self.partner[len(self.seen) - 1] if self.partner else x
        return mx.concatenate([x, other] if self.first else [other, x])


def expected(row: ScoreRow, model) -> tuple[np.ndarray, bool]:
    logits = model(mx.array([row.tokens[:-1]]))[0]
    best = mx.argmax(logits, axis=-1).tolist()
    greedy = best[row.start - 1 :] == list(row.tokens[row.start :])
    return twin_logprobs(model, row.tokens, len(row.tokens))[row.start :], greedy


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_right_changes_nothing(name):
    model = tiny_configs.build(name)
    scores = score(loaded(name), MESH, ROWS)
    for row, one in zip(ROWS, scores, strict=True):
        logprobs, greedy = expected(row, model)
        assert one.logprobs.dtype == np.float32
        np.testing.assert_allclose(one.logprobs, logprobs, rtol=0, atol=LOGPROB_TOLERANCE)
        assert one.is_greedy == greedy
        assert one.total == pytest.approx(logprobs.sum(dtype=float), abs=1e-3)


def test_greedy_rows_are_known_as_such():
    """A row that continues with the likeliest tokens, and the same with one of them changed."""
    model, tokens = tiny_configs.build("llama"), [5, 3, 8]
    for _ in range(6):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    other = [*tokens[:-3], (tokens[-3] + 1) % 90, *tokens[-2:]]
    rows = [ScoreRow(tokens, 3), ScoreRow(tokens, 1), ScoreRow(other, 3), ScoreRow(other, 8)]
    greedy = [one.is_greedy for one in score(loaded(), MESH, rows)]
    expect = [expected(row, model)[1] for row in rows]
    assert greedy == expect and greedy[0] and not greedy[2]


@pytest.mark.parametrize(("size", "tokens"), [(1, 2048), (3, 2048), (32, 40), (2, 1)])
def test_how_rows_are_batched_does_not_change_their_scores(size, tokens):
    scores = score(loaded(), MESH, ROWS, batch_size=size, batch_tokens=tokens)
    for one, reference in zip(scores, score(loaded(), MESH, ROWS), strict=True):
        np.testing.assert_allclose(one.logprobs, reference.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "tokens"), [(1, 2048), (3, 64), (4, 100), (32, 1)])
def test_batches(size, tokens):
    lengths = [int(n) for n in rng.integers(1, 50, 40)]
    batches = scoring._batches(lengths, size, tokens)
    assert sorted(i for batch in batches for i in batch.rows) == list(range(40))
    assert [b.length for b in batches] == sorted((b.length for b in batches), reverse=True)
    for batch in batches:
        assert batch.length == max(lengths[i] for i in batch.rows)
        assert len(batch.rows) <= size
        assert len(batch.rows) * batch.length <= tokens or len(batch.rows) == 1


def test_a_microbatch_is_worked_on_in_parts(monkeypatch):
    """The float32 work has a bound; how small it is does not show in the numbers."""
    whole = score(loaded(), MESH, ROWS)
    sizes = []

    def watched(logits, *args):
        sizes.append(logits.size)
        return token_logprobs(logits, *args)

    token_logprobs = scoring.token_logprobs
    monkeypatch.setattr(scoring, "token_logprobs", watched)
    monkeypatch.setattr(scoring, "_BLOCK", 3000)
    parts = score(loaded(), MESH, ROWS)
    assert len(sizes) > 10 and max(sizes) <= 3000
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-6)
        assert one.is_greedy == other.is_greedy


def test_only_what_is_asked_for_is_worked_on(monkeypatch):
    """The context of a choice may be long; its float32 log-probabilities are not needed."""
    lengths = []

    def watched(logits, *args):
        lengths.append(logits.shape[1])
        return token_logprobs(logits, *args)

    token_logprobs = scoring.token_logprobs
    monkeypatch.setattr(scoring, "token_logprobs", watched)
    score(loaded(), MESH, [ScoreRow(ROWS[1].tokens, 37), ScoreRow(ROWS[5].tokens, 32)])
    assert sum(lengths) == 39 - 31


def test_the_likeliest_token_over_a_spread_vocabulary():
    """As of the whole vocabulary, ties included, whichever rank holds it."""
    logits = mx.array(rng.integers(-4, 4, (5, 7, 30)).astype(np.float32))  # full of ties
    for cut in (1, 13, 29):
        halves = [logits[..., :cut], logits[..., cut:]]
        seen = []
        for i, half in enumerate(halves):
            group = Half(i == 0, [])
            scoring._argmax(half, i * cut, group)
            seen.append(group.seen)
        for i, half in enumerate(halves):
            best = scoring._argmax(half, i * cut, Half(i == 0, seen[1 - i]))
            assert best.tolist() == mx.argmax(logits, axis=-1).tolist()


def test_progress_covers_every_row():
    done = []
    score(loaded(), MESH, ROWS, batch_size=3, on_rows=lambda rows: done.append(len(rows)))
    assert done == [3, 3, 2]


def test_no_rows():
    assert score(loaded(), MESH, []) == []


@pytest.mark.parametrize(("tokens", "start"), [([1, 2], 0), ([1, 2], 2), ([1], 1), ([], 1)])
def test_a_row_has_something_to_score(tokens, start):
    with pytest.raises(ValueError, match=f"start={start} of a row of {len(tokens)} tokens"):
        ScoreRow(tokens, start)


def test_a_row_beyond_the_context_is_refused():
    """The last token is predicted, not seen: it may stand one place after the context's end."""
    context = tiny_configs.CONFIGS["llama"]["max_position_embeddings"]
    assert len(score(loaded(), MESH, [ScoreRow([7] * (context + 1), context)])) == 1
    with pytest.raises(InputError, match=f"{context + 2} tokens .* context of {context}"):
        score(loaded(), MESH, [ScoreRow([7] * (context + 2))])


def test_nan_is_not_a_score(monkeypatch):
    """One damaged row is enough, and another's padding is not."""

    def scores(rows, *args):
        return [Score(np.array([np.nan if row is ROWS[3] else -1.0]), False) for row in rows]

    monkeypatch.setattr(scoring, "_scores", scores)
    with pytest.raises(IntegrityError, match="NaN for row 3 of 8"):
        score(loaded(), MESH, ROWS)
    score(loaded(), MESH, ROWS[:3])
