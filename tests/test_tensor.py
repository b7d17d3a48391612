"""Tensor parallelism against the unsplit model: every plan, several rank counts and shares.

The ranks are threads of this process, each with its own cut model, whose all_sum exchanges
evaluated arrays. Weights are slices of the whole model's by the returned cuts, so the cuts are
proved along with the modules.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import MODEL_REMAPPING

import hpcmlx  # noqa: F401  (a fast BLAS, before MLX)
from hpcmlx.errors import ConfigError
from hpcmlx.models.plans import PLANS, plan_for
from hpcmlx.parallel import layers
from hpcmlx.parallel.partition import Cut
from hpcmlx.parallel.rules import Plan, Replicate, Rowwise
from hpcmlx.parallel.tensor import Shares, apply_plan, vocab_interval

VOCAB = 101
BASE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_theta": 1e4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 16,
    "num_hidden_layers": 2,
}
MOE3 = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
GEMMA3 = {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16.0}
OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
# name: (model type, changes to BASE)
MODELS: dict[str, tuple[str, dict]] = {
    "deepseek_v3": ("deepseek_v3", MLA),
    "deepseek_v3_no_q_lora": ("deepseek_v3", {**MLA, "q_lora_rank": None, "attention_bias": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16.0}),
    "gemma3_text": ("gemma3_text", {**GEMMA3, "num_key_value_heads": 1}),
    "gemma3_text_untied": ("gemma3_text", GEMMA3),
    "gpt_oss": ("gpt_oss", OSS),
    "kimi_k2": ("kimi_k2", MLA),
    "kimi_k25": ("kimi_k25", MLA),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 96}),
    "phi3": ("phi3", {"hidden_size": 96}),
    "qwen2": ("qwen2", {"hidden_size": 96, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen3_moe": ("qwen3_moe", MOE3),
    "smollm2": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
}

WIDE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3}
WIDE_MLA = {
    "hidden_size": 64,
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 96,
}
AFFINE4 = {"group_size": 32, "bits": 4}
AFFINE8 = {"group_size": 32, "bits": 8}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}


def mixed(path: str, module: nn.Module) -> dict:
    """Formats by the kind of module, as published checkpoints mix them."""
    if "experts." in path or "switch_mlp." in path:
        return MXFP4
    if "self_attn" in path:
        return AFFINE8
    return NVFP4 if "mlp." in path else AFFINE4


# name: (one of MODELS, changes to it, format of a module)
QUANTIZED: dict[str, tuple[str, dict, Callable]] = {
    "llama_4bit": ("llama", WIDE, lambda *_: AFFINE4),
    "llama_8bit": ("llama", WIDE, lambda *_: AFFINE8),
    "llama_mxfp8": ("llama", WIDE, lambda *_: MXFP8),
    "llama_nvfp4": ("llama", WIDE, lambda *_: NVFP4),
    "llama_mixed": ("llama", WIDE, mixed),
    # Two heads to a quantization group of o_proj.
    "llama_narrow": (
        "llama",
        {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 6},
        lambda *_: AFFINE4,
    ),
    "smollm2_4bit": ("smollm2", {"hidden_size": 64, "head_dim": 32}, lambda *_: AFFINE4),
    "phi3_4bit": ("phi3", {"hidden_size": 192}, lambda *_: AFFINE4),
    "qwen3_moe_mixed": ("qwen3_moe", {**WIDE, "moe_intermediate_size": 96}, mixed),
    "gpt_oss_mixed": ("gpt_oss", {"hidden_size": 64, "head_dim": 32}, mixed),
    "deepseek_v3_mixed": ("deepseek_v3", WIDE_MLA, mixed),
}
SHARES = {"tp2": [1, 1], "tp3": [1, 1, 1], "tp4": [1, 1, 1, 1], "2-1": [2, 1], "3-1-2": [3, 1, 2]}


def build(name: str) -> nn.Module:
    """The unsplit model with random weights; the same at every call."""
    base, quantized_changes, quantization = QUANTIZED.get(name, (name, {}, None))
    model_type, changes = MODELS[base]
    config = {**BASE, **changes, **quantized_changes, "model_type": model_type}
    if model_type == "kimi_k25":
        config = {"model_type": model_type, "text_config": config}
    arch = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    model = arch.Model(arch.ModelArgs.from_dict(config))
    if name == "gemma3_text":
        model.sanitize({})  # ties the head

    rng = np.random.default_rng(7)

    def random(path: str, a: mx.array) -> mx.array:
        if path.endswith("norm.weight"):
            return a
        scale = 0.3 if a.ndim == 1 else 1.2 / a.shape[-1] ** 0.5
        return mx.array(rng.normal(size=a.shape, scale=scale).astype(np.float32))

    model.update(tree_map_with_path(random, model.parameters()))
    if quantization:

        def predicate(path: str, module: nn.Module) -> bool | dict:
            # An embedding in mxfp or nvfp would make all activations bfloat16.
            if isinstance(module, nn.Embedding):
                return AFFINE8
            return hasattr(module, "to_quantized") and quantization(path, module)

        nn.quantize(model, class_predicate=predicate)
    return model


def plan_of(name: str) -> Plan:
    return plan_for(MODELS[QUANTIZED.get(name, (name,))[0]][0])


class ThreadGroup:
    """A tensor-parallel group whose ranks are threads; sums are taken at once, not lazily."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list):
        self.rank, self.size, self._barrier, self._box = rank, size, barrier, box

    def all_sum(self, x: mx.array) -> mx.array:
        @mx.custom_function
        def total(x: mx.array) -> mx.array:
            self._box[self.rank] = np.array(x.astype(mx.float32))
            self._barrier.wait()
            result = mx.array(np.sum(self._box, axis=0)).astype(x.dtype)
            self._barrier.wait()
            return result

        @total.vjp
        def identity(_x: mx.array, cotangent: mx.array, _y: mx.array) -> mx.array:
            return cotangent

        return total(x)


def on_ranks(size: int, body: Callable[[ThreadGroup], object]) -> list:
    """Run `body` on every rank; its results in rank order."""
    barrier, box = threading.Barrier(size, timeout=30), [None] * size
    results: list = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = body(ThreadGroup(rank, size, barrier, box))
        except BaseException as error:  # noqa: BLE001  (raised again in the caller)
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    causes = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    for error in causes + errors:
        raise error
    return results


def take(a: np.ndarray, cut: Cut | None) -> np.ndarray:
    if cut is None:
        return a
    parts = [a.take(range(start, stop), cut.axis) for start, stop in cut.intervals]
    return np.concatenate(parts, cut.axis)


def numpy_parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {path: np.array(a) for path, a in tree_flatten(model.parameters())}


def cut_model(
    model: nn.Module, name: str, group: ThreadGroup, weights: list[float], whole: dict
) -> dict[str, Cut]:
    """Cut `model` and give it its slices of `whole`."""
    cuts = apply_plan(model, plan_of(name), group, Shares(tuple(weights)))
    parameters = dict(tree_flatten(model.parameters()))
    assert parameters.keys() == whole.keys()
    local = {path: mx.array(take(a, cuts.get(path))) for path, a in whole.items()}
    for path, a in parameters.items():
        assert (a.shape, a.dtype) == (local[path].shape, local[path].dtype), path
    model.update(tree_unflatten(list(local.items())))
    return cuts


RNG = np.random.default_rng(11)
PROMPT = RNG.integers(0, VOCAB, (2, 7))
STEPS = RNG.integers(0, VOCAB, (3, 2, 1))


def run(model: nn.Module) -> list[np.ndarray]:
    """Logits of the prompt and of three decode steps, with caches."""
    caches = make_prompt_cache(model)
    return [np.array(model(mx.array(ids), cache=caches)) for ids in (PROMPT, *STEPS)]


def logprobs(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def join_vocabulary(results: list[tuple]) -> list[np.ndarray]:
    """Whole logits from each rank's (vocabulary interval, logits of every step)."""
    assert results[0][0][0] == 0
    assert results[-1][0][1] == VOCAB
    for (interval, _), (following, _) in pairwise(results):
        assert interval[1] == following[0]
    return [np.concatenate(parts, -1) for parts in zip(*(r[1] for r in results), strict=True)]


def assert_close(results: list[tuple], reference: list[np.ndarray], tolerance: float) -> None:
    for got, want in zip(join_vocabulary(results), reference, strict=True):
        difference = np.abs(logprobs(got) - logprobs(want)).max()
        assert difference <= tolerance


@cache
def reference(name: str) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    model = build(name)
    return numpy_parameters(model), run(model)


def test_every_plan_is_in_the_matrix():
    types = {MODEL_REMAPPING.get(t, t) for t, _ in MODELS.values()}
    assert types == PLANS.keys()


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", MODELS)
def test_matches_the_unsplit_model(name, shares):
    whole, expected = reference(name)
    weights = SHARES[shares]

    def body(group: ThreadGroup) -> tuple:
        model = build(name)
        cut_model(model, name, group, weights, whole)
        return vocab_interval(model), run(model)

    results = on_ranks(len(weights), body)
    assert_close(results, expected, 1e-4)


@pytest.mark.parametrize("shares", ["tp2", "tp3", "2-1"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_matches_the_unsplit_model(name, shares):
    test_matches_the_unsplit_model(name, shares)


def test_half_precision_stays_half_precision():
    def body(group: ThreadGroup) -> mx.Dtype:
        model = build("qwen2")
        model.set_dtype(mx.bfloat16)
        apply_plan(model, plan_for("qwen2"), group)
        return model(mx.array(PROMPT)).dtype

    assert on_ranks(2, body) == [mx.bfloat16] * 2


def rank_of(size: int, rank: int = 0) -> SimpleNamespace:
    """A group that can be told apart but does not communicate."""
    return SimpleNamespace(rank=rank, size=size)


def test_one_rank_leaves_the_model_as_it_is():
    model = build("llama")
    before = {path: type(m) for path, m in model.named_modules()}
    assert apply_plan(model, plan_for("llama"), rank_of(1)) == {}
    assert {path: type(m) for path, m in model.named_modules()} == before
    assert vocab_interval(model) is None


def test_nothing_is_evaluated():
    # 2**30 rows of 2**20 floats: two petabytes, if anyone looked.
    model = build("smollm2")
    rows = 2**30
    model.model.embed_tokens.weight = mx.zeros((rows, 2**20), mx.bfloat16)
    cuts = apply_plan(model, plan_for("llama"), rank_of(2, rank=1), Shares((3, 1)))
    weight = model.model.embed_tokens.weight
    shape, dtype = weight.shape, weight.dtype  # a failing assert would print, so read, the array
    assert (shape, dtype) == ((rows // 4, 2**20), mx.bfloat16)
    assert cuts["model.embed_tokens.weight"] == Cut(0, ((rows - rows // 4, rows),))
    assert vocab_interval(model) == (rows - rows // 4, rows)


def test_cuts_of_packed_weights():
    model = build("llama_4bit")
    cuts = apply_plan(model, plan_for("llama"), rank_of(2, rank=1), Shares((2, 1)))
    down = "model.layers.1.mlp.down_proj"
    # 96 inputs are 3 groups: rank 1 holds the last, in 4 words of 8 and in one scale.
    assert cuts[f"{down}.weight"] == Cut(1, ((8, 12),))
    assert cuts[f"{down}.scales"] == cuts[f"{down}.biases"] == Cut(1, ((2, 3),))
    assert f"{down}.bias" not in cuts
    q = "model.layers.1.self_attn.q_proj"
    assert {cuts[f"{q}.{name}"] for name in ("weight", "scales", "biases", "bias")} == {
        Cut(0, ((128, 192),))
    }


def test_quantum_of_a_format_that_the_loader_dequantizes():
    model = build("llama")
    quantum = {f"model.layers.{i}.mlp.down_proj": 32 for i in range(2)}
    cuts = apply_plan(model, plan_for("llama"), rank_of(2), quantum=quantum)
    assert cuts["model.layers.0.mlp.down_proj.weight"] == Cut(1, ((0, 64),))
    assert cuts["model.layers.0.mlp.gate_proj.weight"] == Cut(0, ((0, 64),))


def test_key_value_heads_are_repeated_when_query_heads_fall_unevenly():
    model = build("smollm2")  # 9 query heads, 3 KV heads of 16
    cuts = apply_plan(model, plan_for("llama"), rank_of(4, rank=1), Shares((2, 4, 2, 1)))
    attention = model.model.layers[0].self_attn
    # Query heads 2 to 5: one of KV head 0, three of KV head 1.
    assert (attention.n_heads, attention.n_kv_heads) == (4, 4)
    assert cuts["model.layers.0.self_attn.q_proj.weight"] == Cut(0, ((32, 96),))
    assert cuts["model.layers.0.self_attn.k_proj.weight"] == Cut(0, ((0, 32), (16, 32), (16, 32)))


def loss_and_gradients(model: nn.Module, group: ThreadGroup | None) -> tuple[float, dict]:
    """Mean cross entropy of the prompt from vocabulary-parallel logits, and its gradients."""
    inputs, targets = mx.array(PROMPT[:, :-1]), mx.array(PROMPT[:, 1:])
    all_sum = group.all_sum if group else lambda x: x
    start, stop = vocab_interval(model) or (0, VOCAB)

    def loss(model: nn.Module) -> mx.array:
        logits = model(inputs)
        held = (targets >= start) & (targets < stop)
        local = mx.where(held, targets - start, 0)
        picked = mx.take_along_axis(logits, local[..., None], -1).squeeze(-1)
        target = all_sum(mx.where(held, picked, 0))
        return (mx.log(all_sum(mx.exp(logits).sum(-1))) - target).mean()

    value, gradients = nn.value_and_grad(model, loss)(model)
    return value.item(), {path: np.array(a) for path, a in tree_flatten(gradients)}


@pytest.mark.parametrize(
    "name", ["llama", "smollm2", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3"]
)
def test_gradients_match_the_unsplit_model(name):
    weights = [3, 1, 2] if name != "gpt_oss" else [1, 1, 1, 1]
    whole_model = build(name)
    whole = numpy_parameters(whole_model)
    expected_loss, expected = loss_and_gradients(whole_model, None)

    def body(group: ThreadGroup) -> tuple:
        model = build(name)
        cuts = cut_model(model, name, group, weights, whole)
        blocks = [p for p, m in model.named_modules() if isinstance(m, layers.Block)]
        return cuts, blocks, *loss_and_gradients(model, group)

    results = on_ranks(len(weights), body)
    for path, gradient in expected.items():
        total = np.zeros_like(gradient)
        for cuts, blocks, loss, gradients in results:
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            positions = range(gradient.shape[0])
            axis = 0
            if cut := cuts.get(path):
                axis = cut.axis
                positions = [i for start, stop in cut.intervals for i in range(start, stop)]
            # Outside blocks every rank has the whole gradient of what is replicated.
            share = 1 if cut or path.startswith(tuple(f"{b}." for b in blocks)) else len(results)
            np.add.at(np.moveaxis(total, axis, 0), positions,
                      np.moveaxis(gradients[path], axis, 0) / share)  # fmt: skip
        np.testing.assert_allclose(total, gradient, atol=2e-5, err_msg=path)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("llama", 8, ["llama", "6 query heads", "parallel.tp=6", "parallel.pp"]),
        ("deepseek_v3", 5, ["deepseek_v3", "4 query heads", "parallel.tp=4"]),
        ("llama_narrow", 4, ["o_proj", "groups of 32", "16 wide", "parallel.tp=3"]),
        ("smollm2_4bit", 4, ["down_proj", "3 quantization groups of 32", "parallel.tp=3"]),
    ],
)
def test_too_many_ranks_are_refused_and_leave_the_model_alone(name, size, words):
    model = build(name)
    shapes = {path: a.shape for path, a in tree_flatten(model.parameters())}
    with pytest.raises(ConfigError) as refusal:
        apply_plan(model, plan_of(name), rank_of(size))
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {path: a.shape for path, a in tree_flatten(model.parameters())} == shapes
    assert not any(isinstance(m, layers.Block) for _, m in model.named_modules())


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (1, 0), (2, -1)])
def test_shares_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigError, match="tp_shares"):
        apply_plan(build("llama"), plan_for("llama"), rank_of(2), Shares(weights))


def test_a_model_without_a_plan_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'gemma3n'.*deepseek_v3, gemma2.*parallel\.pp"):
        plan_for("gemma3n")


LLAMA = PLANS["llama"]
GATE = "model.layers.*.mlp.gate_proj"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({k: v for k, v in LLAMA.items() if k != GATE}, r"mlp\.gate_proj\.weight.*does not name"),
        ({**LLAMA, "model.layers.*.mlp.gate": Replicate()}, r"has no model\.layers\.\*\.mlp\.gate"),
        ({**LLAMA, "model.layers.0.mlp": Replicate()}, r"two rules for model\.layers\.0\.mlp"),
        ({**LLAMA, "model.layers.*.mlp.down_proj": Replicate()}, "nothing rowwise in"),
        ({**LLAMA, "model.norm": Rowwise("hidden")}, "a RMSNorm"),
        (PLANS["qwen3"], r"has no model\.layers\.\*\.self_attn\.q_norm"),
        (PLANS["phi3"], "qkv_proj"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        apply_plan(build("llama"), Plan("llama", rules), rank_of(2))


def test_an_unknown_kind_of_projection_is_refused():
    model = build("llama")
    model.model.layers[1].mlp.up_proj = nn.Bilinear(4, 4, 4)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj, a Bilinear"):
        apply_plan(model, plan_for("llama"), rank_of(2))
