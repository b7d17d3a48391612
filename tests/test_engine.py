"""The batch engine in one process against mlx-lm's own greedy decoding."""

from __future__ import annotations

import logging
from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.comm import Communicator
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.loader import LoadedModel
from hpcmlx.parallel.pipeline import build_stage, find_layers
from tests import tiny_configs
from tests.twin import NumberTokenizer, assert_same_greedy, twin_greedy

MESH = Mesh(ParallelDims(), Communicator())
VOCAB = 128
# Lengths around a chunk of 4, a row of one token, and more rows than places.
PROMPTS = [
    np.random.default_rng(i).integers(0, 90, n).tolist()
    for i, n in enumerate((3, 1, 13, 4, 5, 9, 2, 1, 8, 6))
]
NUM_NEW = 7


@lru_cache(maxsize=1)
def loaded(name: str = "llama") -> LoadedModel:
    model = tiny_configs.build(name)
    num_layers = len(find_layers(model))
    stage = build_stage(model, None, 0, num_layers)
    config = tiny_configs.CONFIGS[name]
    return LoadedModel(stage, config, (0, VOCAB), VOCAB, num_layers, 0, 0, [(0, num_layers)])


@lru_cache(maxsize=1)
def twins(name: str = "llama"):
    """mlx-lm's tokens and gaps of every prompt."""
    model = tiny_configs.build(name)
    return [twin_greedy(model, p, NUM_NEW) for p in PROMPTS]


def run(prompts, sampling=lambda i: SamplingParams(max_tokens=NUM_NEW), *, name="llama", eos=(),
        tokenizer=None, **options):  # fmt: skip
    """(results in input order, stats) of an engine over `prompts`."""
    tokenizer = tokenizer or NumberTokenizer(eos)
    engine = Engine(loaded(name), MESH, tokenizer, **options)
    rows = []
    requests = [Request(i, f"id{i}", tuple(p), sampling(i)) for i, p in enumerate(prompts)]
    stats = engine.run(requests, rows.append)
    assert sorted(row.index for row in rows) == list(range(len(prompts)))
    return sorted(rows, key=lambda row: row.index), stats


def assert_like_twin(rows, name="llama"):
    for row, (tokens, gaps) in zip(rows, twins(name), strict=True):
        assert_same_greedy(row.tokens, tokens, gaps, f"{name} row {row.index}")


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_greedy_rows_equal_mlx_lm(batch_size, num_microbatches):
    rows, stats = run(
        PROMPTS, batch_size=batch_size, num_microbatches=num_microbatches, prefill_chunk=4
    )
    assert_like_twin(rows)
    assert all(row.finish_reason == "length" and len(row.tokens) == NUM_NEW for row in rows)
    assert [row.num_prompt_tokens for row in rows] == [len(p) for p in PROMPTS]
    assert [row.id for row in rows] == [f"id{i}" for i in range(len(PROMPTS))]
    assert rows[0].text == "".join(f"{t} " for t in rows[0].tokens)
    assert all(0 < row.ttft <= row.seconds for row in rows)
    assert stats.num_rows == len(PROMPTS)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.generated_tokens == NUM_NEW * len(PROMPTS)


@pytest.mark.parametrize("chunk", [1, 4, 12, 512])
def test_prompts_in_chunks(chunk):
    rows, _ = run(PROMPTS, batch_size=4, prefill_chunk=chunk)
    assert_like_twin(rows)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_of_different_lengths_leave_and_join(batch_size):
    """Every row ends at another step, so places free up while the next step is already running."""
    rows, _ = run(
        PROMPTS, lambda i: SamplingParams(max_tokens=1 + (3 * i) % NUM_NEW), batch_size=batch_size
    )
    for row, (tokens, gaps) in zip(rows, twins(), strict=True):
        length = 1 + (3 * row.index) % NUM_NEW
        assert_same_greedy(row.tokens, tokens[:length], gaps, f"row {row.index}")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("place", [0, 2])
def test_an_end_token_stops_a_row(batch_size, place):
    """At the first token, or later; it is among the tokens and not in the text."""
    eos = twins()[0][0][place]
    rows, _ = run(PROMPTS, eos=[eos], batch_size=batch_size)
    stopped = 0
    for row, (tokens, gaps) in zip(rows, twins(), strict=True):
        assert gaps.min() > 1e-3  # so that the cases below are what they say
        end = tokens.index(eos) + 1 if eos in tokens else NUM_NEW
        assert list(row.tokens) == tokens[:end]
        assert row.finish_reason == ("stop" if eos in tokens else "length")
        text = tokens[: end - (eos in tokens)]
        assert row.text == "".join(f"{t} " for t in text)
        stopped += eos in tokens
    assert 0 < stopped < len(rows)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_token_each(batch_size):
    rows, stats = run(PROMPTS, lambda i: SamplingParams(max_tokens=1), batch_size=batch_size)
    for row, (tokens, _) in zip(rows, twins(), strict=True):
        assert row.tokens == (tokens[0],) and row.finish_reason == "length"
    assert stats.generated_tokens == len(PROMPTS)
    # No step is started for rows that are at their length.
    assert stats.num_steps == -(-len(PROMPTS) // batch_size)


def test_the_last_token_allowed_may_be_an_end_token():
    eos = twins()[0][0][0]
    (row,), _ = run(PROMPTS[:1], lambda i: SamplingParams(max_tokens=1), eos=[eos])
    assert (row.finish_reason, row.text, row.tokens) == ("stop", "", (eos,))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_strings_span_tokens_and_are_cut_off(batch_size):
    tokens = twins()[0][0]
    stop = f"{tokens[1]} {tokens[2]}"  # ends inside the text of a third token
    rows, _ = run(
        PROMPTS,
        lambda i: SamplingParams(max_tokens=NUM_NEW, stop=("never", stop) if i == 0 else ()),
        batch_size=batch_size,
    )
    assert rows[0].text == f"{tokens[0]} "
    assert rows[0].finish_reason == "stop" and list(rows[0].tokens) == tokens[:3]
    assert all(row.finish_reason == "length" for row in rows[1:])


def test_the_earliest_of_several_stop_strings_counts():
    tokens = twins()[0][0]
    text = "".join(f"{t} " for t in tokens)
    late, early = text[4:9], text[3:9]
    (row,), _ = run(PROMPTS[:1], lambda i: SamplingParams(max_tokens=9, stop=(late, early)))
    assert row.text == text[: min(text.find(late), text.find(early))]


class Withholding(NumberTokenizer):
    """A tokenizer whose text comes late, as a detokenizer's does inside a character."""

    @property
    def detokenizer(self):
        class Late:
            def __init__(self):
                self.text, self.held = "", ""

            def add_token(self, token):
                self.text, self.held = self.text + self.held, f"{token} "

            def finalize(self):
                self.text, self.held = self.text + self.held, ""

        return Late()


def test_a_stop_string_that_only_shows_at_the_end():
    tokens = twins()[0][0]
    stop = f"{tokens[2]} "
    assert tokens[2] not in tokens[:2]
    (row,), _ = run(
        PROMPTS[:1],
        lambda i: SamplingParams(max_tokens=3, stop=(stop,)),
        tokenizer=Withholding(),
    )
    assert row.finish_reason == "stop" and not row.text.endswith(stop)
    assert row.text == "".join(f"{t} " for t in tokens[:2])


def test_samples_do_not_depend_on_batch_or_slots():
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {},
        {"temperature": 2, "top_k": 9},
    ]

    def sampling(i):
        return SamplingParams(max_tokens=NUM_NEW, seed=i, **kinds[i % len(kinds)])

    def tokens(**options):
        return [row.tokens for row in run(PROMPTS, sampling, **options)[0]]

    alone = tokens(batch_size=1)
    assert len(set(alone)) == len(alone)
    assert alone == tokens(batch_size=3) == tokens(batch_size=8, num_microbatches=2)
    assert alone == tokens(batch_size=4, prefill_chunk=2)


STATEFUL = [
    "mamba2", "jamba", "gemma3_text", "qwen3_next", "recurrent_gemma", "rwkv7", "falcon_h1",
    "nemotron_h", "lfm2", "gpt_oss", "deepseek_v3",
]  # fmt: skip


@pytest.mark.parametrize("name", STATEFUL)
def test_states_windows_and_hybrids(name):
    """Prompts and outputs reach beyond the sliding windows; three places for ten rows."""
    rows, _ = run(PROMPTS, name=name, batch_size=3, prefill_chunk=4)
    assert_like_twin(rows, name)


@pytest.mark.parametrize("name", ["gemma2", "recurrent_gemma"])
def test_an_architecture_that_cannot_batch_runs_row_by_row_and_says_so(name, caplog):
    with caplog.at_level(logging.WARNING):
        engine = Engine(loaded(name), MESH, NumberTokenizer(), batch_size=4)
    assert engine.batch_size == 1
    (record,) = caplog.records
    assert "one row at a time instead of 4" in record.getMessage()
    rows, _ = run(PROMPTS, name=name, batch_size=4)
    assert_like_twin(rows, name)


def test_one_row_at_a_time_needs_no_check(caplog):
    with caplog.at_level(logging.WARNING):
        Engine(loaded("gemma2"), MESH, NumberTokenizer(), batch_size=1)
    assert not caplog.records


def test_no_requests():
    rows, stats = run([])
    assert rows == [] and stats.num_steps == 0


def test_an_engine_runs_again():
    engine = Engine(loaded(), MESH, NumberTokenizer(), batch_size=2)
    results = []
    for _ in range(2):
        requests = [
            Request(i, str(i), tuple(p), SamplingParams(max_tokens=3))
            for i, p in enumerate(PROMPTS[:3])
        ]
        engine.run(requests, lambda row: results.append((row.index, row.tokens)))
    assert sorted(results[:3]) == sorted(results[3:])


def test_caches_are_evaluated_on_the_way():
    """The lazy graph of a long prompt does not pile up: memory stays at a chunk's."""
    prompt = np.random.default_rng(0).integers(0, 90, 400).tolist()
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    run([prompt], lambda i: SamplingParams(max_tokens=2), batch_size=1, prefill_chunk=8)
    chunked = mx.get_peak_memory() - base
    mx.reset_peak_memory()
    run([prompt], lambda i: SamplingParams(max_tokens=2), batch_size=1, prefill_chunk=400)
    assert chunked < 0.7 * (mx.get_peak_memory() - base)
