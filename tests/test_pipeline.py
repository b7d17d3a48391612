"""Every architecture of mlx-lm, cut into pipeline stages, against the unsplit model.

A stage is run with NaN in every parameter that it does not claim to need. The table of what is
right and what is refused goes to `docs/architectures.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import _get_classes

from hpcmlx.errors import ConfigError
from hpcmlx.models.plans import PLANS
from hpcmlx.parallel.partition import balance_layers
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

# What a pipeline refuses: the cuts (None: the model as a whole), and words of the refusal. Layers
# that share a cache may be cut elsewhere.
REFUSED: dict[str, tuple[tuple[int | None, ...], str]] = {
    "afm7": ((2,), "share a cache"),
    "bitnet": ((None,), "Metal"),
    "gemma3n": ((3,), "share a cache"),
    "iquestloopcoder": ((1, 2), "outside its layer's call"),
    "muse_spark": ((None,), "Metal"),
}
DEEP = (
    "llama", "gemma3_text", "gemma4_text", "rwkv7", "kimi_k3", "hunyuan", "qwen3_next", "mamba2",
    "jamba", "nemotron_h", "deepseek_v3", "deepseek_v32", "gpt_oss", "minimax_m3_vl", "falcon_h1",
)  # fmt: skip
PADDED = (
    "llama", "gemma3_text", "gemma4_text", "qwen3_next", "jamba", "nemotron_h", "deepseek_v3",
    "falcon_h1", "mamba2", "rwkv7",
)  # fmt: skip

verdicts: dict[str, str] = {}


@pytest.fixture(scope="session", autouse=True)
def architecture_table() -> Iterator[None]:
    yield
    if set(verdicts) == set(tiny_configs.CONFIGS):
        path = Path(__file__).parents[1] / "docs" / "architectures.md"
        if not path.exists() or path.read_text(encoding="utf-8") != _table():
            path.write_text(_table(), encoding="utf-8")


def _table() -> str:
    right = sum(verdict == "right" for verdict in verdicts.values())
    lines = [
        "# Architectures",
        "",
        "Written by `tests/test_pipeline.py`. One tiny random model per architecture of mlx-lm",
        "runs as two pipeline stages, cut in the middle and after the first layer, on a Linux CPU",
        "host. Right: prefill and decode are those of the unsplit model (log-probabilities within",
        "1e-4 in float32). Otherwise the cut is refused by name before any weight is read.",
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
    for start, stop in pairwise(bounds):
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


def _steps(lengths: tuple[int, ...] = (PREFILL, *[1] * STEPS)) -> list[mx.array]:
    rng = np.random.default_rng(7)
    return [mx.array(rng.integers(3, 90, (BATCH, n)).astype(np.int32)) for n in lengths]


def _check(model_type: str, flow: Dataflow, bounds: list[int], steps: list[mx.array]) -> None:
    """Every step with a cache, and the first without, against the unsplit model."""
    whole = tiny_configs.build(model_type)
    cache = make_prompt_cache(whole)
    stages = _stages(model_type, flow, bounds)
    caches = [stage.make_cache() for stage in stages]
    for tokens in steps:
        _same(_run(stages, tokens, caches), whole(tokens, cache=cache))
    _same(_run(stages, steps[0]), whole(steps[0]))


@pytest.mark.parametrize("model_type", sorted(tiny_configs.CONFIGS, key=str.lower))
def test_two_stages(model_type: str) -> None:
    refused_cuts, words = REFUSED.get(model_type, ((), ""))
    refusals, right = {}, []
    try:
        flow = trace(tiny_configs.new(model_type))
        half = flow.num_layers // 2
    except ConfigError as refusal:
        refusals[None] = str(refusal)
    else:
        for cut in sorted({1, half}):
            try:
                check_stage(flow, 0, cut)
                check_stage(flow, cut, flow.num_layers)
            except ConfigError as refusal:
                refusals[cut] = str(refusal)
            else:
                _check(model_type, flow, [0, cut, flow.num_layers], _steps())
                right.append(cut)
    assert tuple(refusals) == refused_cuts
    for text in refusals.values():
        assert text.startswith(f"{model_type}: ") and words in text and "\n" not in text
    verdict = "right" if right else ""
    if refusals:
        reason = next(iter(refusals.values())).partition(": ")[2]
        verdict = f"right after layer {right[0]}, " if right else ""
        verdict += f"refused: {reason}"
    verdicts[model_type] = verdict


@pytest.mark.parametrize("model_type", DEEP)
def test_three_stages_and_one_layer_per_stage(model_type: str) -> None:
    """Uneven cuts, a second chunk of prefill, leaves that skip stages, stages without attention."""
    flow = trace(tiny_configs.new(model_type))
    n = flow.num_layers
    steps = _steps((5, 4, 1, 1))
    _check(model_type, flow, [0, 1, n - 1, n], steps)
    _check(model_type, flow, list(range(n + 1)), steps)


def test_a_stage_of_only_layers_that_share_keys() -> None:
    """gemma4's last layers have no cache of their own, but masks that depend on the offset."""
    flow = trace(tiny_configs.new("gemma4_text"))
    assert not all(flow.leaves[key].fixed for key in flow.crossing(4))
    _check("gemma4_text", flow, [0, 4, 6], _steps((5, 4, 3, 1, 1)))


def _batched(cache: Any, padding: list[int]) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_batched(part, padding) for part in cache.caches))
    if isinstance(cache, RotatingKVCache):
        return BatchRotatingKVCache(cache.max_size, padding)
    if isinstance(cache, ArraysCache):
        return ArraysCache(len(cache.cache), padding)
    return BatchKVCache(padding)


@pytest.mark.parametrize("model_type", PADDED)
def test_left_padded_batches(model_type: str) -> None:
    """Batch caches, whose offsets and padding are arrays, in place of the model's own."""
    padding = [3, 0]
    flow = trace(tiny_configs.new(model_type))
    whole = tiny_configs.build(model_type)
    cache = [_batched(entry, padding) for entry in make_prompt_cache(whole)]
    stages = _stages(model_type, flow, [0, 1, flow.num_layers - 1, flow.num_layers])
    caches = [
        stage.make_cache([_batched(entry, padding) for entry in make_prompt_cache(whole)])
        for stage in stages
    ]
    for tokens in _steps():
        ours, theirs = _run(stages, tokens, caches), whole(tokens, cache=cache)
        _same(ours[1:], theirs[1:])
        # The padding itself holds anything, and so do its columns in the first row.
        _same(ours[:1, -1:], theirs[:1, -1:])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "rwkv7"])
def test_gradients_flow_through_stages(model_type: str) -> None:
    """vjp of each stage by its inputs and parameters, chained, is the whole model's gradient."""
    (tokens,) = _steps((4,))
    whole = tiny_configs.build(model_type)
    flow = trace(tiny_configs.new(model_type))
    n = flow.num_layers
    cotangent = mx.array(np.random.default_rng(3).standard_normal((BATCH, 4, 128)), mx.float32)
    expected = dict(
        tree_flatten(nn.value_and_grad(whole, lambda: (whole(tokens) * cotangent).sum())()[1])
    )
    first, last = _stages(model_type, flow, [0, 1, n])

    def as_function(stage: Stage, names: list[str], inputs: int) -> Any:
        def run(*arrays: mx.array) -> Any:
            stage.model.load_weights(list(zip(names, arrays[inputs:], strict=True)), strict=False)
            out = stage(tokens, arrays[:inputs])
            return out if isinstance(out, list) else [out]

        return run

    def arguments(stage: Stage) -> tuple[list[str], list[mx.array]]:
        items = [x for x in tree_flatten(stage.model.parameters()) if x[0] in stage.parameters]
        return [name for name, _ in items], [value for _, value in items]

    sent = first(tokens)
    names, values = arguments(last)
    _, grads = mx.vjp(as_function(last, names, len(sent)), [*sent, *values], [cotangent])
    total = dict(zip(names, grads[len(sent) :], strict=True))
    names, values = arguments(first)
    _, early = mx.vjp(as_function(first, names, 0), values, grads[: len(sent)])
    for name, grad in zip(names, early, strict=True):
        total[name] = total[name] + grad if name in total else grad
    assert set(total) == set(expected)
    for name, grad in expected.items():
        np.testing.assert_allclose(total[name], grad, rtol=1e-4, atol=1e-4, err_msg=name)


def test_trace_evaluates_nothing_and_leaves_no_trace() -> None:
    """A model of a terabyte is traced from placeholders, and is the same model afterwards."""
    config = {
        **tiny_configs.CONFIGS["llama"], "hidden_size": 16384, "intermediate_size": 53248,
        "num_hidden_layers": 120, "num_attention_heads": 128, "head_dim": 128,
    }  # fmt: skip
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    before = dict(tree_flatten(model.parameters()))
    types = [type(layer) for layer in find_layers(model)]
    mx.reset_peak_memory()
    flow = trace(model)
    assert mx.get_peak_memory() < 2**24
    after = dict(tree_flatten(model.parameters()))
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert [type(layer) for layer in find_layers(model)] == types
    (leaf,) = (flow.leaves[key] for key in flow.crossing(60))
    assert (leaf.layer, leaf.index, leaf.fixed) == (59, 0, True)
    assert leaf.shape(3, 11) == (3, 11, 16384)


def test_a_stage_names_what_it_must_load() -> None:
    flow = trace(tiny_configs.new("llama"))
    stage = build_stage(tiny_configs.build("llama"), flow, 1, 2)
    assert stage.parameters and all(name.startswith("model.layers.1.") for name in stage.parameters)
    held = {name for name, _ in tree_flatten(stage.model.parameters())}
    assert {name for name in held if ".layers." in name} == stage.parameters
    assert "model.embed_tokens.weight" in check_stage(flow, 0, 1)
    assert "lm_head.weight" in check_stage(flow, 3, 4)


def test_one_stage_is_the_model_itself() -> None:
    model = tiny_configs.build("gemma3_text")
    types = [type(module) for module in model.modules()]
    stage = build_stage(model, None, 0, 6)
    assert [type(module) for module in model.modules()] == types
    assert stage.first and stage.last and stage.parameters == {
        name for name, _ in tree_flatten(model.parameters())
    }  # fmt: skip
    cache, other = stage.make_cache(), make_prompt_cache(model)
    for tokens in _steps():
        assert mx.array_equal(stage(tokens, (), cache), model(tokens, cache=other))


def test_layers_are_refused_unless_they_tile_the_model() -> None:
    check_layers(5, [(0, 2), (2, 3), (3, 5)])
    for ranges in (
        [(0, 2), (3, 5)],
        [(0, 3), (2, 5)],
        [(0, 4)],
        [(1, 5)],
        [(0, 2), (2, 2), (2, 5)],
    ):
        with pytest.raises(ConfigError, match="stage"):
            check_layers(5, ranges)
    with pytest.raises(ConfigError, match="3 pipeline stages for 2 layers"):
        check_layers(2, [(0, 1), (1, 2), (2, 3)])
    with pytest.raises(ConfigError, match="not a stage"):
        check_stage(trace(tiny_configs.new("llama")), 2, 9)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no list of layers"):
        find_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("seed", range(5))
def test_balanced_layers_are_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 9, 8).tolist()
    last = int(rng.integers(0, 12))
    for stages in (1, 2, 3, 4, 8):
        counts = balance_layers(costs, stages, last)
        assert sum(counts) == len(costs) and min(counts) >= 1 and len(counts) == stages

        def worst(cuts: tuple[int, ...], stages: int = stages) -> float:
            bounds = [0, *cuts, len(costs)]
            totals = [float(sum(costs[a:b])) for a, b in pairwise(bounds)]
            totals[-1] += last
            return max(totals)

        best = min(map(worst, combinations(range(1, len(costs)), stages - 1)))
        assert worst(tuple(accumulate(counts))[:-1]) == best


def test_balanced_layers_even_out_what_the_dearest_stage_leaves_free() -> None:
    assert balance_layers([1.0] * 30, 2) == [15, 15]
    assert balance_layers([1.0] * 30, 2, last_cost=8.0) == [19, 11]
    assert balance_layers([1, 1, 1, 1, 9], 3) == [2, 2, 1]
    with pytest.raises(ValueError, match="2 layers"):
        balance_layers([1, 1], 3)
