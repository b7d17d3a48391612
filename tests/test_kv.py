"""What rows cost in cache memory, and that admission never goes over it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.kv import Budget, CacheCost, Load, measure_cost, num_bytes
from hpcmlx.inference.kv_quantized import quantize_caches
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams
from tests import tiny_configs
from tests.test_engine import MESH, NUM_NEW, PROMPTS, loaded, run
from tests.twin import NumberTokenizer

KINDS = ["llama", "gemma3_text", "mamba2", "falcon_h1", "deepseek_v3", "qwen3_next"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [1, 255, 256, 300, 700])
def test_a_row_takes_no_more_than_its_cost(name, length):
    stage, piece = loaded(name).stage, 64
    cost = measure_cost(stage, piece)
    caches = stage.make_cache()
    for start in range(0, length, piece):
        stage(mx.zeros((1, min(piece, length - start)), mx.int32), [], caches)
        held = num_bytes(caches)
        assert held <= cost(Load(1, start + piece, prefill=True))
    stage(mx.zeros((1, 1), mx.int32), [], caches)
    assert num_bytes(caches) <= cost(Load(1, length + 1))
    # The cost is not a wild guess either: room for growing, no more.
    assert cost(Load(1, length + 1)) <= num_bytes(caches) + cost(Load(1, 0))


def test_windows_and_states_do_not_grow():
    window = CacheCost(fixed=5, per_position=2, windows=((100, 3),), piece=10)
    assert window(Load(1, 1000)) == 5 + 2 * 1256 + 300
    assert window(Load(2, 1000, prefill=True)) == 2 * (5 + 2 * 1256 + 330)
    state = measure_cost(loaded("mamba2").stage, 64)
    assert state(Load(1, 10)) == state(Load(1, 10**6)) > 0


def test_all_ranks_must_have_the_room():
    class Replica(Communicator):
        def allgather(self, value):
            return [value, (CacheCost(0, 10), 5000)]

    budget = Budget(Replica(0, 2), CacheCost(0, 1), 10**9)
    assert budget.fits([Load(1, 100)]) and not budget.fits([Load(2, 100)])
    assert budget.bytes_of([Load(2, 100)]) == 2 * 356


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
@pytest.mark.parametrize("rows", [1.3, 3, 8])
def test_admission_never_goes_over_the_budget(name, rows):
    """Room for about `rows` rows; ten want to run in two slots of four places."""
    one = measure_cost(loaded(name).stage, 4)
    row = [Load(1, 13, prefill=True), Load(1, 13 + NUM_NEW + 1)]
    limit = int(rows * sum(map(one, row)))
    options = {"batch_size": 4, "num_microbatches": 2, "prefill_chunk": 4, "kv_memory": limit}
    engine = Engine(loaded(name), MESH, NumberTokenizer(), **options)
    requests = [
        Request(i, str(i), tuple(p), SamplingParams(max_tokens=NUM_NEW))
        for i, p in enumerate(PROMPTS)
    ]
    assert [engine.why_too_large(request) for request in requests] == [None] * len(requests)
    seen, active, ended = [], [], []

    def look():
        seen.append(engine.kv_bytes)
        active.append(engine.stats.num_active)

    engine.run(requests, ended.append, look)
    assert len(ended) == len(requests)
    assert 0 < max(seen) <= limit
    assert max(active) <= 8 and (rows > 2) == (max(active) > 1)


def test_a_row_that_can_never_fit_is_named():
    engine = Engine(loaded(), MESH, NumberTokenizer(), kv_memory=1000)
    reason = engine.why_too_large(Request(0, "a", (1, 2), SamplingParams()))
    assert "inference.kv_memory" in reason and "max_tokens" in reason


# -- 8 bits --


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_eight_bits_equal_mlx_lms(batch_size):
    name = "wide"
    tiny_configs.CONFIGS.setdefault(name, tiny_configs.CONFIGS["llama"] | {
        "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    })  # fmt: skip
    model = tiny_configs.build(name)
    rows, _ = run(PROMPTS, name=name, batch_size=batch_size, kv_bits=8, prefill_chunk=4)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        steps = generate_step(
            mx.array(prompt), model, max_tokens=NUM_NEW, kv_bits=8, kv_group_size=32,
            quantized_kv_start=0, prefill_step_size=4,
        )  # fmt: skip
        for mine, (token, logprobs) in zip(row.tokens, steps, strict=True):
            best = np.sort(np.array(logprobs))[-2:]
            # The order of sums changes what is rounded to 8 bits: a thousandth of a logit.
            if best[1] - best[0] < 5e-3 and mine != token:
                break
            assert mine == token, f"row {row.index}"


def test_eight_bits_take_a_third_of_float32():
    stage = loaded("wide").stage
    packed = measure_cost(stage, 4, lambda caches: quantize_caches(caches, 8))
    whole = measure_cost(stage, 4)
    assert packed(Load(1, 1000)) < 0.4 * whole(Load(1, 1000))


def test_heads_that_cannot_be_packed_are_refused():
    with pytest.raises(ConfigError, match="heads are 8 wide, not a multiple of 32"):
        Engine(loaded("llama"), MESH, NumberTokenizer(), kv_bits=8)
