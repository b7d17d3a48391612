"""Prefixes are planned so that every row is found, and computed once."""

from __future__ import annotations

import numpy as np
import pytest

from hpcmlx.inference.prefix import PrefixCache, plan_prefixes

SYSTEM = list(range(50, 70))


def test_a_system_prompt_is_found_once():
    prompts = [[*SYSTEM, i, *range(i)] for i in range(8)]
    plan = plan_prefixes(prompts)
    (prefix,) = plan.prefixes
    assert list(prefix.tokens) == SYSTEM and prefix.parent == -1
    assert plan.prefix_of == [0] * 8
    # The longest first, so that rows of equal length are neighbours.
    assert plan.order == list(range(7, -1, -1))


def test_prefixes_nest():
    few_shot = [*SYSTEM, *range(30)]
    prompts = [[*few_shot, 100 + i] for i in range(5)] + [[*SYSTEM, 200 + i] for i in range(5)]
    plan = plan_prefixes(prompts)
    assert [list(p.tokens) for p in plan.prefixes] == [SYSTEM, few_shot]
    assert [p.parent for p in plan.prefixes] == [-1, 0]
    assert plan.prefix_of == [1] * 5 + [0] * 5


def test_samples_of_one_prompt_share_all_of_it():
    plan = plan_prefixes([SYSTEM] * 5)
    assert list(plan.prefixes[0].tokens) == SYSTEM and plan.prefix_of == [0] * 5


def test_what_saves_little_is_left_alone():
    assert plan_prefixes([[1, 2, 3], [1, 2, 4]]).prefixes == []
    assert len(plan_prefixes([[1, 2, 3], [1, 2, 4]], min_saved=2).prefixes) == 1
    assert plan_prefixes([SYSTEM] * 5, share=False).prefixes == []


@pytest.mark.parametrize("seed", range(100))
def test_a_plan_is_sound(seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 2, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 20))]
    plan = plan_prefixes(prompts, min_saved=int(rng.choice([1, 2, 5])))
    assert sorted(plan.order) == list(range(len(prompts)))
    position = {row: i for i, row in enumerate(plan.order)}
    for row, number in enumerate(plan.prefix_of):
        while number >= 0:
            prefix = plan.prefixes[number]
            assert prompts[row][: len(prefix.tokens)] == list(prefix.tokens)
            assert position[row] < prefix.stop and prefix.parent < number
            number = prefix.parent


def test_caches_are_computed_once_from_their_parents_and_let_go():
    few_shot = [*SYSTEM, *range(30)]
    plan = plan_prefixes(
        [[*few_shot, 100 + i] for i in range(5)] + [[*SYSTEM, 100 + i] for i in range(5)]
    )
    computed = []

    def prefill(tokens, parent):
        computed.append(list(tokens))
        return [*(parent or []), *tokens]

    cache = PrefixCache(plan, prefill)
    assert cache.get(1) == few_shot and cache.get(0) == SYSTEM and cache.get(1) == few_shot
    assert computed == [SYSTEM, few_shot[len(SYSTEM) :]]
    assert sorted(cache.lengths) == [len(SYSTEM), len(few_shot)]
    cache.release(plan.prefixes[1].stop)
    remaining = [p for p in plan.prefixes if p.stop > plan.prefixes[1].stop]
    assert len(cache.lengths) == len(remaining)
    while cache.shrink():
        pass
    assert cache.lengths == []
