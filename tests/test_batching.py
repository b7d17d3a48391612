"""Every architecture that says it can step rows of different lengths together gives each row the
numbers that it gets alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.inference.batching import merge_caches, why_not_batched
from hpcmlx.parallel.pipeline import Stage, build_stage, find_layers
from tests import tiny_configs

TOLERANCE = 1e-4
LENGTHS = (1, 3, 9)  # of the prompts: nothing to prefill, a bit, more than a sliding window of 4
NUM_STEPS = 4

# Those that run row by row, with words of the reason.
REFUSED = {
    "afm7": "padding",
    "deepseek_v41": "no attribute 'merge'",
    "gemma2": "broadcast",
    "gpt_bigcode": "",
    "llama4": "no attribute 'merge'",
    "longcat_flash_ngram": "broadcast",
    "minimax_m3_vl": "padding",
    "phi3small": "broadcast",
    "recurrent_gemma": "state",
}
NEEDS_METAL = {"bitnet", "muse_spark"}


def whole(name: str) -> Stage:
    model = tiny_configs.build(name)
    return build_stage(model, None, 0, len(find_layers(model)))


def step(stage: Stage, tokens: list[list[int]], caches: list) -> np.ndarray:
    logits = np.array(stage(mx.array(tokens), [], caches)[:, -1].astype(mx.float32), np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def prefilled(stage: Stage, prompt: list[int]) -> list:
    caches = stage.make_cache()
    if len(prompt) > 1:
        stage(mx.array([prompt[:-1]]), [], caches)
        mx.eval([cache.state for cache in caches])
    return caches


@pytest.mark.parametrize("name", sorted(tiny_configs.CONFIGS.keys() - NEEDS_METAL, key=str.lower))
def test_a_row_in_a_batch_gets_the_numbers_it_gets_alone(name):
    stage = whole(name)
    reason = why_not_batched(stage)
    if name in REFUSED:
        assert reason is not None and REFUSED[name] in reason and "\n" not in reason
        return
    assert reason is None
    rng = np.random.default_rng(0)
    # Row r is fed feeds[r]: the end of its prompt, then its steps.
    prompts = [rng.integers(0, 90, n).tolist() for n in LENGTHS]
    feeds = [[p[-1], *rng.integers(0, 90, NUM_STEPS).tolist()] for p in prompts]
    alone = []
    for prompt, feed in zip(prompts, feeds, strict=True):
        caches = prefilled(stage, prompt)
        alone.append([step(stage, [[token]], caches)[0] for token in feed])
    # Two rows start, the third joins after a step, the first leaves after two more: as in the
    # engine's continuous admission.
    batch = merge_caches([prefilled(stage, p) for p in prompts[:2]])
    rows = {0: 0, 1: 0}  # row -> steps done
    for number in range(NUM_STEPS):
        if number == 1:
            for cache, joining in zip(
                batch, merge_caches([prefilled(stage, prompts[2])]), strict=True
            ):
                cache.extend(joining)
            rows[2] = 0
        if number == 3:
            for cache in batch:
                cache.filter(mx.array([1, 2]))
            del rows[0]
        together = step(stage, [[feeds[row][done]] for row, done in rows.items()], batch)
        for numbers, (row, done) in zip(together, rows.items(), strict=True):
            worst = np.abs(numbers - alone[row][done]).max()
            assert worst <= TOLERANCE, f"row {row} of {len(rows)}, step {done}"
        rows = {row: done + 1 for row, done in rows.items()}


def test_the_check_evaluates_nothing_and_leaves_the_model_alone():
    stage = build_stage(tiny_configs.new("llama"), None, 0, 4)
    rows = 2**30  # a terabyte, if anyone looked
    stage.model.model.embed_tokens.weight = mx.zeros((rows, 32))
    assert why_not_batched(stage) is None
