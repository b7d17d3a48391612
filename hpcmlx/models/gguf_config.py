"""What a GGUF file means in mlx-lm's words: the model config from its metadata, and Hugging Face
tensor names. Whatever is not in these tables is refused by name, so that nothing is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hpcmlx.errors import ConfigError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DENSE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    **_DENSE,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# GGUF architecture -> (mlx-lm's model_type, names inside a layer)
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "llama": ("llama", _DENSE),
    "qwen2": ("qwen2", _DENSE),
    "qwen3": ("qwen3", {**_DENSE, **_QK_NORM}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, **_QK_NORM}),
}
_BIASED = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}

# Keys below "<architecture>." that are understood; any other may change what the model computes.
_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "attn_logit_softcapping",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
}


def architecture_of(metadata: Mapping[str, Any]) -> str:
    """The file's architecture.

    Raises:
        ConfigError: it is not one of `ARCHITECTURES`, or the file is only a part of a model.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConfigError(
            f"GGUF architecture {arch!r} is not supported ({', '.join(ARCHITECTURES)} are); "
            "use the model's safetensors directory"
        )
    if metadata.get("split.count", 1) > 1:
        raise ConfigError(
            f"this GGUF file is one of {metadata['split.count']} parts; "
            "join them with `llama-gguf-split --merge`"
        )
    return str(arch)


def hf_name(arch: str, name: str) -> str:
    """The Hugging Face name of the GGUF tensor `name`.

    Raises:
        ConfigError: the architecture has no such tensor.
    """
    stem, _, leaf = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is None and stem in _TOP and leaf == "weight":
        return f"{_TOP[stem]}.weight"
    if layer is not None:
        number, part = layer.groups()
        names = ARCHITECTURES[arch][1]
        if part in names and (leaf == "weight" or (leaf == "bias" and part in _BIASED)):
            return f"model.layers.{number}.{names[part]}.{leaf}"
    raise ConfigError(f"GGUF tensor {name} has no place in mlx-lm's {ARCHITECTURES[arch][0]}")


def read_config(
    metadata: Mapping[str, Any], names: Sequence[str], vocab_size: int, rope_freqs: Sequence[float]
) -> dict[str, Any]:
    """config.json of the model that the metadata describes (without its quantization).

    Args:
        names: GGUF names of the file's tensors.
        vocab_size: rows of the embedding.
        rope_freqs: the tensor rope_freqs.weight, or nothing.

    Raises:
        ConfigError: a key is missing, unknown, or has a value that mlx-lm cannot follow.
    """
    arch = architecture_of(metadata)
    keys = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}
    if unknown := sorted(keys.keys() - _KEYS):
        raise ConfigError(f"GGUF key {arch}.{unknown[0]} is not understood; use safetensors")

    def number(key: str, default: Any = None) -> Any:
        value = keys.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int | float):
            raise ConfigError(f"GGUF key {arch}.{key} must be one number, got {value!r}")
        return value

    if number("expert_count", 0):
        raise ConfigError(f"GGUF {arch} with experts is not supported; use safetensors")
    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise ConfigError(
                f"GGUF key {arch}.{key} is {keys[key]}, mlx-lm's {arch} wants {head_dim}"
            )
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[arch][0],
        "hidden_size": hidden,
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 1e6 if arch == "gemma3" else 10000.0),
        "max_position_embeddings": number("context_length"),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in names,
        "rope_scaling": _rope_scaling(arch, keys, rope_freqs, head_dim, number),
        "torch_dtype": "float16",
        **_token_ids(metadata),
    }
    if arch in ("gemma2", "gemma3"):
        _gemma(arch, keys, config, number)
    elif 0 < number("attention.sliding_window", 0) < config["max_position_embeddings"]:
        raise ConfigError(f"GGUF {arch} with a sliding window is not supported; use safetensors")
    if arch == "llama":
        config |= _biases(names)
    elif arch == "qwen2" and "blk.0.attn_q.bias" not in names:
        raise ConfigError("GGUF qwen2 without attention biases does not fit mlx-lm's qwen2")
    return config


def _biases(names: Sequence[str]) -> dict[str, bool]:
    """mlx-lm's llama has biases on all of q, k, v, o or none, and on all of the MLP or none."""
    found = {name.split(".")[2] for name in names if name.endswith(".bias")}
    attention, mlp = (
        {n for n in _BIASED if n.startswith("attn")},
        {n for n in _BIASED if n.startswith("ffn")},
    )
    for group in (attention, mlp):
        if found & group and not group <= found:
            raise ConfigError(f"GGUF llama has biases on {sorted(found & group)} only")
    return {"attention_bias": attention <= found, "mlp_bias": mlp <= found}


def _gemma(arch: str, keys: Mapping[str, Any], config: dict[str, Any], number: Any) -> None:
    # The file does not hold the attention scale; llama.cpp knows the two 27B models (46 and 62
    # layers) by their depth: these scale by hidden / heads, all others by the head's size.
    big = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[arch]
    per_head = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = per_head if big else config["head_dim"]
    if arch == "gemma2":
        config["attn_logit_softcapping"] = number("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = number("final_logit_softcapping", 30.0)
        return
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if number(key, 0.0):
            raise ConfigError(f"GGUF key gemma3.{key} is not supported")
    config["sliding_window"] = number("attention.sliding_window")
    config["rope_local_base_freq"] = number("rope.freq_base_swa", 10000.0)
    pattern = keys.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):  # one flag per layer, true where the window slides
        period = pattern.index(False) + 1 if False in pattern else len(pattern) + 1
        if any(flag != bool((i + 1) % period) for i, flag in enumerate(pattern)):
            raise ConfigError("GGUF key gemma3.attention.sliding_window_pattern is not periodic")
        pattern = period
    config["sliding_window_pattern"] = pattern


def _rope_scaling(
    arch: str, keys: Mapping[str, Any], rope_freqs: Sequence[float], head_dim: int, number: Any
) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if rope_freqs:
        scaling = _llama3(rope_freqs, number("rope.freq_base", 10000.0), head_dim)
        if arch != "llama" or kind != "none" or scaling is None:
            raise ConfigError("GGUF tensor rope_freqs.weight is not the Llama 3 rope scaling")
        return scaling
    if kind == "none" or (kind == "linear" and number("rope.scaling.factor") == 1):
        return None
    if kind == "linear" and arch != "gemma2":
        return {"rope_type": "linear", "factor": number("rope.scaling.factor")}
    raise ConfigError(f"GGUF {arch} with {kind} rope scaling is not supported; use safetensors")


def _llama3(freqs: Sequence[float], base: float, head_dim: int) -> dict[str, Any] | None:
    """The Llama 3 scaling that gives these factors, or None.

    The file holds the factors only; Meta's releases differ in `factor` alone, so the factors are
    computed again from it and must agree.
    """
    low, high, context = 1.0, 4.0, 8192
    factor = max(freqs)
    expected = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * i / head_dim)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if len(expected) != len(freqs) or any(
        not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(expected, freqs, strict=True)
    ):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    def token(kind: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{kind}_token_id")

    # A chat model ends its turn with eot, a document with eos; llama.cpp stops at either.
    ends = [i for i in dict.fromkeys(map(token, ("eos", "eot", "eom"))) if i is not None]
    return {
        "bos_token_id": token("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
