"""Scoring a text in windows: every token once, with the context it should have."""

from __future__ import annotations

import h5py
import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.errors import InputError
from hpcmlx.inference.evaluate import LogProbs, read_text, score_tokens, write_scores
from hpcmlx.models.tokenizer import _load
from tests import tiny_configs
from tests.fixtures import save_tokenizer
from tests.test_engine import MESH, loaded
from tests.twin import LOGPROB_TOLERANCE, twin_logprobs

TEXT = [int(t) for t in np.random.default_rng(0).integers(0, 90, 41)]


def score(tokens=TEXT, window=9, stride=None, **options) -> LogProbs:
    return score_tokens(loaded(), MESH, tokens, window, stride, **options)


def expected(tokens, window, stride) -> np.ndarray:
    """By the definition: a token counts in the first window that reaches it as a target."""
    model = tiny_configs.build("llama")
    result = np.full(len(tokens), np.nan)
    start = 0
    while True:
        part = tokens[start : start + window]
        if len(part) > 1:
            scores = twin_logprobs(model, part, window)
            fresh = np.isnan(result[start : start + len(part)])
            result[start : start + len(part)][fresh] = scores[fresh]
        if start + window >= len(tokens):
            return result
        start += stride


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize(
    ("window", "stride"),
    [
        (9, None),
        (9, 9),
        (9, 4),
        (9, 8),
        (9, 1),
        (10, 5),
        (2, 1),
        (2, 2),
        (40, 3),
        (41, 7),
        (99, 50),
    ],
)
def test_every_token_is_scored_once_with_its_context(window, stride, batch_size):
    covered = []
    scores = score(window=window, stride=stride, batch_size=batch_size, on_batch=covered.append)
    wanted = expected(TEXT, window, stride or window)
    np.testing.assert_allclose(scores.logprobs, wanted, rtol=0, atol=LOGPROB_TOLERANCE)
    assert np.isnan(scores.logprobs[0])
    if stride is not None and stride < window:
        assert scores.num_predicted == len(TEXT) - 1
    else:
        firsts = len(range(0, len(TEXT), window))
        assert scores.num_predicted == len(TEXT) - firsts
    assert sum(covered) == scores.num_predicted
    assert scores.tokens.tolist() == TEXT and scores.tokens.dtype == np.int32


@pytest.mark.parametrize("length", [2, 8, 9, 10, 11, 18, 19])
def test_texts_around_a_window(length):
    """Also where the last window would be a single token, which nothing predicts."""
    scores = score(TEXT[:length], window=9)
    wanted = twin_logprobs(tiny_configs.build("llama"), TEXT[:length], 9)
    np.testing.assert_allclose(scores.logprobs, wanted, rtol=0, atol=LOGPROB_TOLERANCE)


def test_more_context_changes_the_scores():
    assert np.nanmax(np.abs(score(stride=4).logprobs - score(stride=8).logprobs)) > 1e-2


def test_perplexity():
    scores = LogProbs(np.arange(4), np.log(np.array([np.nan, 0.5, 0.25, 0.125], np.float32)))
    assert scores.num_predicted == 3
    assert scores.nll == pytest.approx(2 * np.log(2))
    assert scores.perplexity == pytest.approx(4)


def test_scores_are_written(tmp_path):
    scores = score()
    write_scores(tmp_path, scores, {"model": "llama", "window": 9})
    with h5py.File(tmp_path / "logprobs.h5") as file:
        np.testing.assert_array_equal(file["tokens"][:], scores.tokens)
        np.testing.assert_array_equal(file["logprobs"][:], scores.logprobs)
        assert file["logprobs"].attrs["unit"] == "nat"
        assert dict(file.attrs) == {
            "model": "llama",
            "window": 9,
            "perplexity": scores.perplexity,
            "num_predicted": scores.num_predicted,
        }
        assert file["logprobs"].fletcher32 and file["tokens"].fletcher32


def test_texts_are_read_whole_or_in_part(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = _load(tmp_path, tmp_path, 2)
    path = tmp_path / "text.txt"
    path.write_text("Hello, αβγ!\n")
    whole = read_text(path, tokenizer)
    assert whole == tokenizer.encode("Hello, αβγ!\n")
    assert read_text(path, tokenizer, 5) == whole[:5]
    with pytest.raises(InputError, match=r"text\.txt has 1 tokens"):
        read_text(path, tokenizer, 1)
    path.write_text("")
    with pytest.raises(InputError, match=r"text\.txt has 0 tokens"):
        read_text(path, tokenizer)
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"text\.txt cannot be read"):
        read_text(path, tokenizer)
    with pytest.raises(InputError, match=r"none\.txt cannot be read"):
        read_text(tmp_path / "none.txt", tokenizer)


def test_windows_do_not_see_each_other():
    """A window's scores stay the same whatever stands before it."""
    other = [*range(9), *TEXT[9:]]
    a, b = score().logprobs[9:], score(other).logprobs[9:]
    np.testing.assert_array_equal(a, b)
    assert mx.isfinite(mx.array(a[1:9])).all().item()
