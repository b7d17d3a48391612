"""Every architecture that says it can step rows of different lengths together gives each row the
numbers that it gets alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hpcmlx.inference.batching import SlotCaches, fork_caches, split_caches, why_not_batched
from hpcmlx.parallel.pipeline import Stage, build_stage, find_layers
from tests import tiny_configs

# Of log-probabilities, float32, of random weights: rounding was seen to reach 2e-4 (kimi_k3, whose
# decays amplify it), and a prompt wrong in its farthest token alone changes 4e-2 or more.
TOLERANCE = 1e-3
# Of the prompts: nothing to prefill, a bit, more than a sliding window of 4, two of one length.
LENGTHS = (1, 3, 9, 7, 7)
SHARED = 3  # tokens with which the last two begin
NUM_STEPS = 7

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


def prefilled_together(stage: Stage, prompts: list[list[int]], shared: int) -> list[list]:
    """Caches of rows of one length that begin alike, as the engine makes them: the shared tokens
    once, the rest without padding in one go."""
    prefix = prefilled(stage, prompts[0][: shared + 1])
    before = [np.array(x) for cache in prefix for x in arrays(cache)]
    caches = fork_caches(prefix, len(prompts))
    stage(mx.array([prompt[shared:-1] for prompt in prompts]), [], caches)
    rows = split_caches(caches, len(prompts))
    mx.eval([cache.state for row in rows for cache in row])
    for old, x in zip(before, (x for cache in prefix for x in arrays(cache)), strict=True):
        np.testing.assert_array_equal(old, np.array(x))  # the prefix is as it was
    return rows


def arrays(cache) -> list[mx.array]:
    return [
        x.astype(mx.float32)
        for part in getattr(cache, "caches", (cache,))
        for _, x in tree_flatten(part.state)
        if isinstance(x, mx.array)
    ]


@pytest.mark.parametrize("name", sorted(tiny_configs.CONFIGS.keys() - NEEDS_METAL, key=str.lower))
def test_a_row_in_a_batch_gets_the_numbers_it_gets_alone(name):
    stage = whole(name)
    reason = why_not_batched(stage)
    if name in REFUSED:
        assert reason is not None and REFUSED[name] in reason and "\n" not in reason
        return
    assert reason is None
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 90, n).tolist() for n in LENGTHS]
    prompts[4][:SHARED] = prompts[3][:SHARED]
    # Row r is fed feeds[r]: the end of its prompt, then its steps.
    feeds = [[p[-1], *rng.integers(0, 90, NUM_STEPS).tolist()] for p in prompts]
    alone = []
    for prompt, feed in zip(prompts, feeds, strict=True):
        caches = prefilled(stage, prompt)
        alone.append([step(stage, [[token]], caches)[0] for token in feed])
    # Rows join and leave as in the engine: at the end, in the place of another, by closing up.
    caches = [prefilled(stage, p) for p in prompts[:3]]
    caches += prefilled_together(stage, prompts[3:], SHARED)
    lengths = [n - 1 for n in LENGTHS]
    batch = SlotCaches(caches[:2], lengths[:2], batched=True)
    places = [0, 1]  # row in each place
    done = [0] * len(prompts)
    for number in range(NUM_STEPS):
        if number == 1:
            batch.append(caches[2:3], lengths[2:3])
            places.append(2)
        if number == 3:
            batch.take_over([0], caches[3:4], lengths[3:4])
            places[0] = 3
        if number == 4:
            batch.take_over([1], caches[4:5], lengths[4:5])
            places[1] = 4
        if number == 5:
            batch.keep([0, 1])
            places.pop()
        batch.step()
        together = step(stage, [[feeds[row][done[row]]] for row in places], batch.entries)
        for numbers, row in zip(together, places, strict=True):
            worst = np.abs(numbers - alone[row][done[row]]).max()
            assert worst <= TOLERANCE, f"row {row} of {len(places)}, step {done[row]}"
            done[row] += 1


def test_padding_that_every_row_has_is_cut_off():
    stage = whole("llama")
    rng = np.random.default_rng(1)
    long, short, later = (rng.integers(0, 90, n).tolist() for n in (100, 5, 7))
    batch = SlotCaches([prefilled(stage, p) for p in (long, short)], [99, 4], batched=True)
    batch.step()
    step(stage, [[long[-1]], [short[-1]]], batch.entries)
    batch.take_over([0], [prefilled(stage, later)], [6])
    assert batch.positions == 100
    alone = [prefilled(stage, short), prefilled(stage, later)]
    step(stage, [[short[-1]]], alone[0])
    batch.step()
    assert batch.positions == 6 and batch.lengths == [7, 6]
    together = step(stage, [[later[-1]], [11]], batch.entries)
    assert batch.positions == 7
    assert np.abs(together[0] - step(stage, [[later[-1]]], alone[1])[0]).max() <= TOLERANCE
    assert np.abs(together[1] - step(stage, [[11]], alone[0])[0]).max() <= TOLERANCE


def test_taking_a_place_over_copies_one_row_and_not_all():
    """Cheaper than mlx-lm's `filter` and `extend`: the buffers stay where they are."""
    stage = whole("llama")
    batch = SlotCaches([prefilled(stage, [1] * 600) for _ in range(16)], [599] * 16, batched=True)
    batch.step()
    step(stage, [[1]] * 16, batch.entries)
    caches = prefilled(stage, [2] * 9)
    mx.eval([entry.state for entry in batch.entries])
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    batch.take_over([3], [caches], [8])
    mx.eval([entry.state for entry in batch.entries])
    assert mx.get_peak_memory() - base < batch.entries[0].nbytes / 2


def test_the_check_evaluates_nothing_and_leaves_the_model_alone():
    stage = build_stage(tiny_configs.new("llama"), None, 0, 4)
    rows = 2**30  # a terabyte, if anyone looked
    stage.model.model.embed_tokens.weight = mx.zeros((rows, 32))
    assert why_not_batched(stage) is None
