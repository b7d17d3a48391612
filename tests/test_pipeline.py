"""Every architecture of mlx-lm, cut into pipeline stages, against the unsplit model.

A stage is run with NaN in every parameter that it does not claim to need. The table of what is right
and what is refused goes to `docs/architectures.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from hpcmlx.errors import ConfigError
from hpcmlx.parallel.pipeline import (
    Dataflow,
    Stage,
    build_stage,
    check_layers,
    check_stage,
    find_layers,
    trace,
)
from tests import tiny_configs

BATCH, PREFILL, STEPS, TOLERANCE = 2, 7, 3, 1e-4

# What a pipeline refuses, and the words of the refusal.
REFUSED = {
    "afm7": "cache",
    "bitnet": "Metal",
    "gemma3n": "cache",
    "iquestloopcoder": "outside its layer's call",
    "muse_spark": "Metal",
}
DEEP = (
    "llama", "gemma3_text", "gemma4_text", "rwkv7", "kimi_k3", "hunyuan", "qwen3_next", "mamba2",
    "jamba", "nemotron_h", "deepseek_v3", "deepseek_v32", "gpt_oss", "minimax_m3_vl",
)  # fmt: skip

verdicts: dict[str, str] = {}


@pytest.fixture(scope="session", autouse=True)
def architecture_table() -> Iterator[None]:
    yield
    if set(verdicts) == set(tiny_configs.CONFIGS):
        path = Path(__file__).parents[1] / "docs" / "architectures.md"
        path.write_text(_table(), encoding="utf-8")


def _table() -> str:
    try:
        from hpcmlx.models.plans import PLANS
    except ImportError:
        PLANS = {}
    right = sum(verdict == "right" for verdict in verdicts.values())
    lines = [
        "# Architectures",
        "",
        "Written by `tests/test_pipeline.py`. One tiny random model per architecture of mlx-lm runs as",
        "two pipeline stages, cut in the middle and after the first layer, on a Linux CPU host:",
        "prefill and decode are those of the unsplit model (log-probabilities within 1e-4 in float32),",
        "or the model is refused by name before any weight is read.",
        "",
        f"{right} of {len(verdicts)} are right on two stages.",
        "",
        "| architecture | 2 stages | tensor parallel |",
        "|---|---|---|",
    ]
    for name in sorted(verdicts, key=str.lower):
        lines.append(f"| {name} | {verdicts[name]} | {'plan' if name in PLANS else '-'} |")
    return "\n".join(lines) + "\n"


def _logprobs(logits: mx.array) -> np.ndarray:
    logits = logits.astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _poison(stage: Stage) -> None:
    """NaN in every parameter that the stage does not ask for."""
    names = dict(tree_flatten(stage.model.parameters()))
    assert stage.parameters <= set(names)
    bad = [
        (name, mx.full(value.shape, mx.nan, value.dtype))
        for name, value in names.items()
        if name not in stage.parameters and mx.issubdtype(value.dtype, mx.floating)
    ]
    stage.model.load_weights(bad, strict=False)


def _stages(model_type: str, flow: Dataflow, bounds: list[int]) -> list[Stage]:
    stages = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        stage = build_stage(tiny_configs.build(model_type), flow, start, stop)
        _poison(stage)
        stages.append(stage)
    return stages


def _run(stages: list[Stage], tokens: mx.array, caches: list[list[Any]] | None = None) -> mx.array:
    arrays: Any = []
    for position, stage in enumerate(stages):
        assert len(arrays) == len(stage.receives)
        for array, leaf in zip(arrays, stage.receives, strict=True):
            if leaf.fixed:
                assert tuple(array.shape) == leaf.shape(*tokens.shape)
                assert array.dtype == leaf.dtype
        arrays = stage(tokens, arrays, None if caches is None else caches[position])
        # What travels is evaluated, as between hosts; so is what the caches hold.
        mx.eval(arrays)
        if caches is not None:
            mx.eval([cache.state for cache in caches[position]])
    return arrays


def _same(ours: mx.array, theirs: mx.array) -> None:
    ours_lp, theirs_lp = _logprobs(ours), _logprobs(theirs)
    finite = np.isfinite(theirs_lp)
    assert np.array_equal(np.isfinite(ours_lp), finite)
    assert finite.any()
    assert np.abs(ours_lp[finite] - theirs_lp[finite]).max() <= TOLERANCE
    top = np.sort(theirs_lp, axis=-1)[..., -2:]
    clear = top[..., 1] - top[..., 0] > 1e-3
    assert np.array_equal(ours_lp.argmax(-1)[clear], theirs_lp.argmax(-1)[clear])


def _steps() -> list[mx.array]:
    rng = np.random.default_rng(7)
    lengths = [PREFILL] + [1] * STEPS
    return [mx.array(rng.integers(3, 90, (BATCH, n)).astype(np.int32)) for n in lengths]


def _references(model_type: str) -> tuple[list[mx.array], mx.array]:
    """The unsplit model's logits: of each step with a cache, and of the first tokens without."""
    model = tiny_configs.build(model_type)
    cache = make_prompt_cache(model)
    logits = [model(tokens, cache=cache) for tokens in _steps()]
    alone = model(_steps()[0])
    mx.eval(logits, alone)
    return logits, alone


def _check(model_type: str, flow: Dataflow, bounds: list[int], references: Any) -> None:
    stages = _stages(model_type, flow, bounds)
    caches = [stage.make_cache() for stage in stages]
    with_cache, without = references
    for tokens, expected in zip(_steps(), with_cache, strict=True):
        _same(_run(stages, tokens, caches), expected)
    _same(_run(stages, _steps()[0]), without)


def _num_layers(flow: Dataflow) -> int:
    return flow.num_layers


@pytest.mark.parametrize("model_type", sorted(tiny_configs.CONFIGS, key=str.lower))
def test_two_stages(model_type: str) -> None:
    if model_type in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[model_type]) as refusal:
            flow = trace(tiny_configs.new(model_type))
            half = flow.num_layers // 2
            check_stage(flow, 0, half)
            check_stage(flow, half, flow.num_layers)
        assert model_type in str(refusal.value) and "\n" not in str(refusal.value)
        verdicts[model_type] = f"refused: {str(refusal.value).partition(': ')[2]}"
        return
    flow = trace(tiny_configs.new(model_type))
    references = _references(model_type)
    n = flow.num_layers
    for cut in sorted({1, n // 2}):
        _check(model_type, flow, [0, cut, n], references)
    verdicts[model_type] = "right"
