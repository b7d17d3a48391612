"""The shape of a model before any weight is read: where parameters come from, and what is refused.

Checkpoints here are tables of names and shapes; no file is opened.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.models.byteranges import TensorInfo
from hpcmlx.models.skeleton import (
    Origin,
    Quantization,
    build_skeleton,
    graph_sources,
    trace_origins,
)
from tests.tiny_configs import CONFIGS

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
LLAMA = CONFIGS["llama"] | WIDE
MiB = 2**20


def info(shape, dtype=mx.float32) -> TensorInfo:
    return TensorInfo(tuple(shape), dtype, Path("model.safetensors"), 0)


def shapes(config, dtype=mx.bfloat16, quantize=None) -> dict[str, TensorInfo]:
    """The checkpoint that `config` describes, in mlx-lm's own naming."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if quantize:
        nn.quantize(model, class_predicate=quantize)
    return {
        name: info(a.shape, dtype if a.dtype == mx.float32 else a.dtype)
        for name, a in tree_flatten(model.parameters())
    }


def skeleton(config, tensors=None, dtype=None, weights="keep"):
    return build_skeleton(config, shapes(config) if tensors is None else tensors, dtype, weights)


def unstacked(tensors, prefix, template, names):
    """The same checkpoint with `prefix.<module>.weight` cut into one tensor per expert."""
    result = {}
    for name, stacked in tensors.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if prefix in name and module in names:
            base = name[: name.index(prefix)]
            for expert in range(stacked.shape[0]):
                path = base + template.format(expert=expert, name=names[module])
                result[path] = info(stacked.shape[1:], stacked.dtype)
        else:
            result[name] = stacked
    return result


# -- nothing is evaluated --

LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_600B = CONFIGS["deepseek_v3"] | {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "vocab_size": 129280, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize("weights", ["keep", "dequantize"])
@pytest.mark.parametrize(
    ("config", "least"), [(LLAMA_70B, 69e9), (DEEPSEEK_600B, 600e9)], ids=["llama70b", "deepseek"]
)
def test_a_huge_model_takes_no_memory(config, least, weights):
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    built = skeleton(config, dtype=mx.float32, weights=weights)
    assert sum(a.size for _, a in tree_flatten(built.model.parameters())) > least
    assert mx.get_peak_memory() - before < 16 * MiB
    assert all(origin.stored for origin in built.origins.values())


def test_a_huge_quantized_model_takes_no_memory():
    def packing(path, module):
        return hasattr(module, "to_quantized") and {"group_size": 64, "bits": 4}

    tensors = shapes(LLAMA_70B, quantize=packing)
    config = LLAMA_70B | {"quantization": {"group_size": 64, "bits": 4}}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for weights in ("keep", "dequantize"):
        skeleton(config, tensors, mx.float32, weights)
    assert mx.get_peak_memory() - before < 16 * MiB


# -- where parameters come from --


def test_plain_parameters_are_stored():
    built = skeleton(LLAMA)
    assert built.origins == {name: Origin((name,), True) for name in shapes(LLAMA)}
    assert built.packed == {}


def test_renamed_tensors_are_stored_and_a_vision_tower_is_left_out():
    """qwen2_vl's sanitize puts the language model under a name of its own."""
    config = CONFIGS["qwen2_vl"]
    full = shapes(config)
    tensors = {name.removeprefix("language_model."): i for name, i in full.items()}
    assert not tensors.keys() & full.keys()
    built = build_skeleton(config, tensors | {"visual.patch.weight": info((3,))}, None, "keep")
    assert built.origins == {
        name: Origin((name.removeprefix("language_model."),), True) for name in full
    }


def test_trace_origins_tells_renamed_from_computed():
    a, b, c = mx.zeros((2, 3)), mx.zeros((2, 3)), mx.zeros((3,))
    inputs = {"a": a, "b": b, "c": c}
    origins = trace_origins(
        inputs, {"same": a, "sum": a + b, "stack": mx.stack([b, b]), "slice": c[1:]}
    )
    assert origins == {
        "same": Origin(("a",), True),
        "sum": Origin(("a", "b"), False),
        "stack": Origin(("b",), False),
        "slice": Origin(("c",), False),
    }
    assert graph_sources(inputs, {"constant": mx.ones((2,))}) == {"constant": []}


EXPERTS = {
    "mixtral": (
        "block_sparse_moe.switch_mlp.", "block_sparse_moe.experts.{expert}.{name}.weight",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    "qwen3_moe": (
        "mlp.switch_mlp.", "mlp.experts.{expert}.{name}.weight",
        {n: n for n in ("gate_proj", "down_proj", "up_proj")},
    ),
    "deepseek_v3": (
        "mlp.switch_mlp.", "mlp.experts.{expert}.{name}.weight",
        {n: n for n in ("gate_proj", "down_proj", "up_proj")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_are_derived_from_each_expert(name):
    config, (prefix, template, names) = CONFIGS[name], EXPERTS[name]
    tensors = unstacked(shapes(config), prefix, template, names)
    assert tensors.keys() != shapes(config).keys()
    built = build_skeleton(config, tensors, None, "keep")
    derived = {path: o for path, o in built.origins.items() if not o.stored}
    assert derived
    for path, origin in derived.items():
        base = path[: path.index(prefix)]
        module = path.removesuffix(".weight").rpartition(".")[2]
        wanted = {base + template.format(expert=e, name=names[module]) for e in range(4)}
        assert set(origin.tensors) == wanted, path
    stored = built.origins.keys() - derived.keys()
    assert all(built.origins[path] == Origin((path,), True) for path in stored)


def test_sanitized_computes_from_what_was_read():
    config, (prefix, template, names) = CONFIGS["qwen3_moe"], EXPERTS["qwen3_moe"]
    tensors = unstacked(shapes(config), prefix, template, names)
    built = build_skeleton(config, tensors, None, "keep")
    path = "model.layers.1.mlp.switch_mlp.up_proj.weight"
    rng = np.random.default_rng(0)
    read = {
        name: mx.array(rng.normal(size=tensors[name].shape)) for name in built.origins[path].tensors
    }
    outputs = built.sanitized(read)
    wanted = [np.array(read[f"model.layers.1.mlp.experts.{e}.up_proj.weight"]) for e in range(4)]
    np.testing.assert_array_equal(np.array(outputs[path]), np.stack(wanted))


def test_a_tied_head_is_dropped_every_time():
    """gemma3_text's sanitize removes lm_head from the model, once per model."""
    config = CONFIGS["gemma3_text"]
    tensors = {n: i for n, i in shapes(config).items() if not n.startswith("lm_head")}
    built = build_skeleton(config, tensors, None, "keep")
    assert "lm_head.weight" not in built.origins
    assert dict(tree_flatten(built.model.parameters())).keys() == tensors.keys()
    assert built.sanitized({}).keys() == tensors.keys()
    assert built.sanitized({}).keys() == tensors.keys()


# -- dtypes --


def test_dtypes():
    tensors = shapes(LLAMA)
    assert set(skeleton(LLAMA).dtypes.values()) == {mx.bfloat16}
    wide = skeleton(LLAMA, tensors, mx.float32)
    assert {a.dtype for _, a in tree_flatten(wide.model.parameters())} == {mx.float32}


def test_parameters_that_a_model_keeps_in_float32_stay_so():
    config = CONFIGS["deepseek_v3"]
    path = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = shapes(config) | {path: info((4,), mx.float32)}
    assert build_skeleton(config, tensors, mx.bfloat16, "keep").dtypes[path] == mx.float32
    others = build_skeleton(config, tensors, mx.float16, "keep").dtypes
    assert {d for p, d in others.items() if "e_score" not in p} == {mx.float16}


# -- quantization --

FORMATS = {
    "affine4": {"group_size": 64, "bits": 4, "mode": "affine"},
    "affine8": {"group_size": 32, "bits": 8, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


def quantized(packing):
    """(config, tensors) of a llama quantized by `packing(path)`, or False."""

    def predicate(path, module):
        return hasattr(module, "to_quantized") and packing(path)

    return shapes(LLAMA, quantize=predicate)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    packing = FORMATS[name]
    tensors = quantized(lambda _: packing)
    config = LLAMA | {"quantization": packing}
    kept = build_skeleton(config, tensors, mx.float32, "keep")
    assert kept.packed == {}
    layer = kept.model.model.layers[0].self_attn.q_proj
    assert (layer.group_size, layer.bits, layer.mode) == tuple(packing.values())
    assert layer.weight.dtype == mx.uint32
    unpacked = build_skeleton(config, tensors, mx.float32, "dequantize")
    assert set(unpacked.packed.values()) == {Quantization(**packing)}
    assert len(unpacked.packed) == 2 * 7 + 2
    weight = unpacked.model.model.layers[0].self_attn.q_proj.weight
    assert (weight.shape, weight.dtype) == ((64, 64), mx.float32)
    assert unpacked.origins["lm_head.scales"] == Origin(("lm_head.scales",), True)


def test_every_layer_may_have_its_own_format():
    def packing(path):
        if "mlp" in path:
            return FORMATS["mxfp4"]
        return path != "lm_head" and FORMATS["affine8"]

    tensors = quantized(packing)
    overrides = {f"model.layers.{i}.mlp.{n}_proj": FORMATS["mxfp4"] for i in (0, 1)
                 for n in ("gate", "up", "down")}  # fmt: skip
    config = LLAMA | {"quantization": FORMATS["affine8"] | overrides | {"lm_head": False}}
    built = build_skeleton(config, tensors, mx.float32, "dequantize")
    assert built.packed["model.layers.1.mlp.up_proj"] == Quantization(32, 4, "mxfp4")
    assert built.packed["model.layers.1.self_attn.q_proj"] == Quantization(32, 8, "affine")
    assert "lm_head" not in built.packed
    # Without the overrides the stored shapes and dtypes still tell.
    config = LLAMA | {"quantization": FORMATS["affine8"]}
    assert build_skeleton(config, tensors, mx.float32, "dequantize").packed == built.packed


@pytest.mark.parametrize("method", ["awq", "gptq", "bitnet", "aqlm", "bitsandbytes"])
def test_other_methods_are_refused_by_name(method):
    config = LLAMA | {"quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(ConfigError, match=f"method '{method}' is not supported.*mlx_lm.convert"):
        skeleton(config)


@pytest.mark.parametrize("method", ["mxfp4", "mxfp8"])
def test_methods_of_the_hub_that_are_mlx_formats(method):
    tensors = quantized(lambda _: FORMATS[method])
    config = LLAMA | {"quantization_config": {"quant_method": method}}
    built = build_skeleton(config, tensors, mx.float32, "dequantize")
    assert set(built.packed.values()) == {Quantization(**FORMATS[method])}


def test_two_level_scales_are_refused():
    tensors = quantized(lambda _: FORMATS["nvfp4"])
    tensors["lm_head.global_scale"] = info(())
    with pytest.raises(ConfigError, match="lm_head has a global_scale"):
        build_skeleton(LLAMA | {"quantization": FORMATS["nvfp4"]}, tensors, None, "keep")


def test_a_format_that_does_not_exist_is_refused():
    tensors = quantized(lambda _: FORMATS["mxfp4"])
    tensors["lm_head.scales"] = info((128, 1), mx.uint8)  # 4 bits in groups of 64
    with pytest.raises(ConfigError, match="lm_head"):
        build_skeleton(LLAMA | {"quantization": FORMATS["mxfp4"]}, tensors, None, "dequantize")


# -- what does not belong together --


def test_missing_extra_and_misshaped_tensors_are_named():
    good = shapes(LLAMA)
    norm = "model.layers.1.input_layernorm.weight"
    missing = {n: i for n, i in good.items() if n != norm}
    with pytest.raises(IntegrityError, match=f"lacks tensor {norm}; copy or fetch"):
        skeleton(LLAMA, missing)
    with pytest.raises(IntegrityError, match=r"lacks tensors .* and \d+ more"):
        skeleton(LLAMA | {"num_hidden_layers": 4}, good)
    with pytest.raises(IntegrityError, match=r"holds tensor model\.extra\.weight, unknown to"):
        skeleton(LLAMA, good | {"model.extra.weight": info((2,))})
    with pytest.raises(IntegrityError, match=rf"{norm} has shape \(63,\).*\(64,\)"):
        skeleton(LLAMA, good | {norm: info((63,))})
    with pytest.raises(IntegrityError, match="do not belong together"):
        skeleton(LLAMA | {"num_hidden_layers": 1}, good)
    with pytest.raises(IntegrityError):
        skeleton(LLAMA, {})


def test_packed_weights_of_the_wrong_shape_are_refused():
    packing = FORMATS["affine8"]
    good, path = quantized(lambda _: packing), "model.layers.0.mlp.up_proj"
    for name, shape in ((f"{path}.weight", (127, 16)), (f"{path}.biases", (128, 1))):
        tensors = good | {name: info(shape, good[name].dtype)}
        for weights in ("keep", "dequantize"):
            with pytest.raises(IntegrityError, match=rf"{name} has shape"):
                build_skeleton(LLAMA | {"quantization": packing}, tensors, mx.float32, weights)
    # The config says another width for this layer than what is stored.
    config = LLAMA | {"quantization": packing | {path: FORMATS["affine4"]}}
    for weights in ("keep", "dequantize"):
        with pytest.raises(IntegrityError, match=path):
            build_skeleton(config, good, mx.float32, weights)
    tensors = quantized(lambda _: FORMATS["mxfp4"]) | {f"{path}.biases": info((128, 2))}
    for weights in ("keep", "dequantize"):
        with pytest.raises(IntegrityError, match=rf"holds tensor {path}\.biases"):
            build_skeleton(LLAMA | {"quantization": FORMATS["mxfp4"]}, tensors, mx.float32, weights)


def test_a_missing_expert_is_named():
    config, (prefix, template, names) = CONFIGS["qwen3_moe"], EXPERTS["qwen3_moe"]
    tensors = unstacked(shapes(config), prefix, template, names)
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    del tensors[gone]
    with pytest.raises(IntegrityError) as refusal:
        build_skeleton(config, tensors, None, "keep")
    assert gone in str(refusal.value)


def test_an_expert_of_another_shape_is_refused():
    config, (prefix, template, names) = CONFIGS["qwen3_moe"], EXPERTS["qwen3_moe"]
    tensors = unstacked(shapes(config), prefix, template, names)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] = info((15, 32))
    with pytest.raises(IntegrityError, match=r"qwen3_moe cannot arrange.*do not belong together"):
        build_skeleton(config, tensors, None, "keep")


def test_half_a_quantized_weight_is_refused():
    tensors = quantized(lambda _: FORMATS["affine8"])
    del tensors["lm_head.biases"]
    config = LLAMA | {"quantization": FORMATS["affine8"]}
    for weights in ("keep", "dequantize"):
        with pytest.raises(IntegrityError, match=r"lm_head\.biases"):
            build_skeleton(config, dict(tensors), mx.float32, weights)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llamma"}, "model type 'llamma' is not one that mlx-lm"),
        ({"model_type": "../evil"}, "model type '../evil' is not one that mlx-lm"),
        ({"model_type": "cache"}, "model type 'cache'"),
        ({"rope_scaling": {"type": "yarrn", "factor": 2}}, "config.json does not fit"),
    ],
)
def test_configs_that_are_refused(changes, words):
    with pytest.raises(ConfigError) as refusal:
        skeleton(LLAMA | changes, {})
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_config_without_a_needed_key():
    config = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
    with pytest.raises(ConfigError, match=r"config\.json does not fit mlx-lm's llama.*hidden_size"):
        skeleton(config, {})


def test_quantized_activations_are_refused():
    config = CONFIGS["llama"] | {"quantize_activations": True}
    with pytest.raises(ConfigError, match="quantize_activations"):
        build_skeleton(config, {}, None, "keep")
