"""One tiny random model per architecture of mlx-lm: what the pipeline's tests run over.

A config holds what `ModelArgs` of the module needs and little else: hidden size 32, four layers
(more where the layer pattern asks for it), a vocabulary of 128. Keys that a
`ModelArgs` does not know are dropped by mlx-lm itself, so the base below carries the names
that most of them share. Not here: olmo, whose module wants a package of its own (ai2-olmo).
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

MOE: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.5,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}

MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

INDEXER: dict[str, Any] = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}

# A mixer of Mamba-2 kind, under the names the hybrids give it.
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}

GATED_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: dict[str, dict[str, Any]] = {}


def _add(model_type: str, *groups: dict[str, Any], **own: Any) -> None:
    config = dict(BASE)
    for group in groups:
        config.update(group)
    CONFIGS[model_type] = {**config, **own, "model_type": model_type}


def _text(*groups: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A nested `text_config`."""
    config = dict(BASE)
    for group in groups:
        config.update(group)
    return {**config, **own}


# Plain transformers: the base is all they need, or nearly.
for _name in (
    "cohere", "exaone4", "ernie4_5", "gemma", "glm", "helium", "hunyuan_v1_dense",
    "internlm2", "internlm3", "llama", "mimo", "nanochat", "olmo2", "qwen2", "qwen3", "seed_oss",
    "smollm3", "starcoder2", "talkie", "telechat3",
):  # fmt: skip
    _add(_name)
CONFIGS["exaone4"] |= {
    "rope_scaling": {"rope_type": "default"},
    "sliding_window": 4,
    "sliding_window_pattern": "LLLG",
}
CONFIGS["nanochat"]["num_key_value_heads"] = 4
CONFIGS["ernie4_5"]["use_bias"] = False
CONFIGS["smollm3"]["no_rope_layer_interval"] = 2
_add("apertus", post_norm=False, qk_norm=True)
_add("bitnet")
_add("cohere2", sliding_window=4, sliding_window_pattern=2)
_add("exaone", num_layers=4, layer_norm_epsilon=1e-5)
_add("gemma2")
_add("gemma3_text", num_hidden_layers=6, sliding_window=4, sliding_window_pattern=3)
_add("gemma3", text_config=_text(model_type="gemma3_text", sliding_window=4,
                                 sliding_window_pattern=2))  # fmt: skip
_add("glm4", partial_rotary_factor=0.5)
_add("gpt2", n_ctx=64, n_embd=32, n_head=4, n_layer=4, n_positions=64, layer_norm_epsilon=1e-5)
_add("gpt_bigcode", n_embd=32, n_layer=4, n_inner=48, n_head=4, n_positions=64,
     layer_norm_epsilon=1e-5)  # fmt: skip
_add("gpt_neox", layer_norm_eps=1e-5, rotary_emb_base=10000, rotary_pct=0.5)
_add("gptj", n_embd=32, layer_norm_epsilon=1e-5, n_positions=64, n_head=4, rotary_dim=4, n_layer=4)
_add("granite", logits_scaling=2.0, attention_multiplier=0.3, embedding_multiplier=3.0,
     residual_multiplier=0.7)  # fmt: skip
_add("iquestloopcoder", loop_num=2, loop_window_size=4)
# Its MLP is a multiple of 256 wide, and 0 below a width of 48.
_add("lille-130m", block_size=64, layer_norm_eps=1e-5, n_embd=64, n_head=4, n_kv_heads=2, n_layer=4)
_add("minicpm", dim_model_base=16, scale_depth=1.4, scale_emb=3.0)
_add("minicpm3", MLA, dim_model_base=16, scale_depth=1.4, scale_emb=3.0,
     rope_scaling={"original_max_position_embeddings": 512, "short_factor": [1.0] * 2,
                   "long_factor": [1.5] * 2})  # fmt: skip
_add("ministral3", layer_types=[FULL, SLIDING, FULL, SLIDING], sliding_window=4,
     rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                      "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
                      "llama_4_scaling_beta": 0.1})  # fmt: skip
_add("mistral3", text_config=_text(model_type="llama"))
_add("muse_glimmer", layer_types=[FULL, SLIDING, FULL, SLIDING], sliding_window=4)
_add("nanbeige", num_loops=1)
_add("nemotron", hidden_act="relu2", norm_eps=1e-5)
_add("nemotron-nas", block_configs=[
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
    {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.0}},
    {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
    {"attention": {"n_heads_in_group": 1}, "ffn": {"no_op": True}},
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
], num_hidden_layers=5)  # fmt: skip
_add("olmo3", layer_types=[SLIDING, SLIDING, FULL, SLIDING], sliding_window=4)
_add("openelm", num_transformer_layers=4, model_dim=32, ffn_dim_divisor=8,
     num_query_heads=[4, 4, 4, 4], num_kv_heads=[2, 2, 4, 4],
     ffn_multipliers=[0.5, 1.0, 1.5, 2.0])  # fmt: skip
_add("phi", layer_norm_eps=1e-5, partial_rotary_factor=0.5)
_add("phi3", partial_rotary_factor=0.5)
_add("phi3small", dense_attention_every_n_layers=2, ff_intermediate_size=48, gegelu_limit=20.0,
     layer_norm_epsilon=1e-5, hidden_size=16, vocab_size=100352,  # it masks ids up to 100351
     blocksparse_num_local_blocks=1)  # fmt: skip
_add("pixtral", text_config=_text(model_type="llama"))
_add("plamo", num_key_value_heads=4, n_shared_head=2)
_add("plamo3", sliding_window=4, window_size=4, sliding_window_pattern=2, rope_local_theta=10000.0)
_add("qwen", kv_channels=8, intermediate_size=96, layer_norm_epsilon=1e-5)
_add("qwen2_vl", text_config=_text(model_type="qwen2"))
_add("qwen3_vl", text_config=_text(model_type="qwen3"))
_add("spark2_5", layer_types=[FULL, SLIDING, FULL, SLIDING], sliding_window=4,
     rope_parameters={FULL: ROPE_DEFAULT, SLIDING: ROPE_DEFAULT})  # fmt: skip
_add("stablelm", use_qkv_bias=True, partial_rotary_factor=0.5, layer_norm_eps=1e-5)
_add("youtu_llm", MLA)

# Experts.
for _name in ("Klear", "dots1", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
    _add(_name, MOE)
CONFIGS["granitemoe"] |= {
    "logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
}  # fmt: skip
_add("afmoe", MOE, layer_types=[SLIDING, SLIDING, FULL, SLIDING], sliding_window=4,
     num_dense_layers=1)  # fmt: skip
_add("bailing_moe", MOE)
_add("dbrx", d_model=32, n_layers=4, n_heads=4,
     ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
     attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0})  # fmt: skip
_add("deepseek", MOE)
_add("ernie4_5_moe", use_bias=False, moe_num_experts=4, moe_layer_start_index=1,
     moe_intermediate_size=16, moe_capacity=[4, 4], moe_k=2, moe_num_shared_experts=1)  # fmt: skip
_add("exaone_moe", MOE, sliding_window=4, layer_types=[SLIDING, FULL, SLIDING, FULL],
     is_moe_layer=[False, True, True, True])  # fmt: skip
_add("glm4_moe", MOE, rope_scaling=None, use_qk_norm=True, partial_rotary_factor=0.5)
_add("gpt_oss", MOE, layer_types=[SLIDING, FULL, SLIDING, FULL], sliding_window=4,
     rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                   "original_max_position_embeddings": 16})  # fmt: skip
_add("hunyuan", MOE, moe_topk=2, num_shared_expert=1, use_mixed_mlp_moe=True, use_qk_norm=True,
     use_cla=True, cla_share_factor=2,
     rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1000.0})  # fmt: skip
_add("laguna", MOE, layer_types=[FULL, SLIDING, SLIDING, FULL], sliding_window=4,
     num_attention_heads_per_layer=[4, 2, 2, 4],
     mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
     rope_parameters={FULL: ROPE_DEFAULT, SLIDING: ROPE_DEFAULT})  # fmt: skip
LLAMA4 = {
    "attention_chunk_size": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48,
    "rope_scaling": None, "use_qk_norm": True,
}  # fmt: skip
_add("llama4", text_config=_text(MOE, LLAMA4, model_type="llama4_text", num_experts_per_tok=1))
_add("llama4_text", intermediate_size_mlp=48, no_rope_layers=[1, 1, 0, 1], use_qk_norm=True)
_add("mellum", MOE, layer_types=[FULL, SLIDING, FULL, SLIDING], sliding_window=4,
     rope_parameters={FULL: ROPE_DEFAULT, SLIDING: ROPE_DEFAULT})  # fmt: skip
_add("mimo_v2_flash", MOE, hybrid_layer_pattern=[0, 1, 1, 0], moe_layer_freq=[0, 1, 1, 1],
     add_swa_attention_sink_bias=True, add_full_attention_sink_bias=False, sliding_window_size=4,
     n_shared_experts=None, layernorm_epsilon=1e-5, swa_rope_theta=10000.0,
     swa_num_attention_heads=4, swa_num_key_value_heads=4, v_head_dim=8, swa_head_dim=8,
     swa_v_head_dim=8, partial_rotary_factor=0.5)  # fmt: skip
_add("minimax", MOE, shared_intermediate_size=16, rotary_dim=4)
_add("minimax_m3_vl", text_config=_text(
    MOE, dense_intermediate_size=48, shared_intermediate_size=16, rotary_dim=4,
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    sparse_attention_config={
        "use_sparse_attention": True, "sparse_num_index_heads": 2, "sparse_index_dim": 8,
        "sparse_block_size": 2, "sparse_topk_blocks": 2, "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1, 1]}))  # fmt: skip
_add("muse_spark", text_config=_text(
    MOE, post_norm_eps=1e-5, rope_parameters=ROPE_DEFAULT, layer_rope_theta=[10000.0] * 4,
    layer_types=[SLIDING, FULL, SLIDING, FULL], sliding_window=4, final_logit_softcapping=20.0,
    output_multiplier=0.5, moe_hidden_size=16, num_shared_experts=0,
    mlp_layer_types=["sparse"] * 4))  # fmt: skip
_add("phimoe", MOE, rope_scaling={
    "type": "longrope", "long_mscale": 1.2, "short_mscale": 1.1,
    "long_factor": [1.5] * 4, "short_factor": [1.1] * 4,
    "original_max_position_embeddings": 64})  # fmt: skip
_add("phixtral", MOE, num_vocab=128, model_dim=32, num_heads=4, num_layers=4, rotary_dim=4)
_add("qwen3_vl_moe", text_config=_text(MOE, model_type="qwen3_moe"))
_add("solar_open", MOE, partial_rotary_factor=0.5)
_add("step3p5", num_attention_groups=2, layer_types=[FULL, SLIDING, SLIDING, FULL],
     sliding_window=4, moe_num_experts=4, moe_top_k=2, moe_intermediate_size=16,
     share_expert_dim=16, moe_layers_enum="1,2,3",
     attention_other_setting={"num_attention_heads": 2, "num_attention_groups": 1})  # fmt: skip

# Latent attention.
for _name in ("deepseek_v3", "glm4_moe_lite", "mistral4"):
    _add(_name, MOE, MLA)
CONFIGS["mistral4"] |= {"qk_head_dim": 12, "rope_parameters": {
    **ROPE_DEFAULT, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8,
}}  # fmt: skip
_add("deepseek_v2", MOE, MLA, topk_method="greedy", rope_scaling={
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
    "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1})  # fmt: skip
_add("deepseek_v32", MOE, MLA, INDEXER)
_add("glm_moe_dsa", MOE, MLA, INDEXER, rope_parameters=ROPE_DEFAULT)
_add("deepseek_v41", MOE, head_dim=16, q_lora_rank=16, qk_rope_head_dim=4, o_groups=2,
     o_lora_rank=16, sliding_window=4, num_key_value_heads=1, **INDEXER)  # fmt: skip
_add("kimi_k25", text_config=_text(MOE, MLA))
_add("kimi_vl", text_config=_text(MOE, MLA))
LONGCAT = {
    "attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 48, "moe_topk": 2,
    "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "num_layers": 4, "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}  # fmt: skip
_add("longcat_flash", MOE, MLA, LONGCAT)
_add("longcat_flash_ngram", MOE, MLA, LONGCAT, ngram_vocab_size_ratio=3, emb_neighbor_num=3,
     emb_split_num=2)  # fmt: skip

# State spaces, linear attention, convolutions and hybrids of them.
_add("baichuan_m1", sliding_window=4, sliding_window_layers=[1, 3], conv_window=2,
     num_swa_attention_heads=4, num_swa_key_value_heads=2)  # fmt: skip
BAILING_LINEAR = {"layer_group_size": 2, "group_norm_size": 2}
_add("bailing_hybrid", MOE, MLA, BAILING_LINEAR)
_add("bailing_moe_linear", MOE, BAILING_LINEAR, num_key_value_heads=4)
_add("bailing_moe_v3", MOE, MLA, layer_group_size=2, moe_shared_expert_intermediate_size=16,
     short_conv_kernel_size=4)  # fmt: skip
_add("falcon_h1", MAMBA2)
_add("gear", layer_types=["conv_mixer", FULL, "conv_mixer", SLIDING], sliding_window=4)
_add("granitemoehybrid", MOE, MAMBA2, layer_types=["mamba", "attention", "mamba", "attention"],
     logits_scaling=2.0, attention_multiplier=0.3, embedding_multiplier=3.0,
     residual_multiplier=0.7, shared_intermediate_size=16)  # fmt: skip
_add("jamba", MOE, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1,
     expert_layer_period=2, mamba_d_conv=4, mamba_d_state=8, mamba_expand=2)  # fmt: skip
KIMI_LINEAR = {
    "num_experts_per_token": 2,
    "linear_attn_config": {"kda_layers": [1, 2, 4], "full_attn_layers": [3], "num_heads": 4,
                           "head_dim": 8, "short_conv_kernel_size": 4},
}  # fmt: skip
_add("kimi_linear", MOE, MLA, KIMI_LINEAR, model_max_length=512)
_add("kimi_k3", text_config=_text(MOE, MLA, KIMI_LINEAR, model_type="kimi_linear",
                                  attn_res_block_size=2, routed_expert_hidden_size=16))  # fmt: skip
LFM2 = {
    "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "full_attn_idxs": [1, 3],
    "block_dim": 32, "block_ff_dim": 48, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}  # fmt: skip
_add("lfm2", LFM2)
_add("lfm2-vl", text_config=_text(LFM2, model_type="lfm2"))
_add("lfm2_moe", MOE, LFM2, use_expert_bias=True, num_dense_layers=1)
_add("mamba", state_size=8, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=4)
_add("mamba2", num_heads=4, head_dim=16, state_size=16, layer_norm_epsilon=1e-5, conv_kernel=4,
     n_groups=1, use_bias=False, use_conv_bias=True, time_step_limit=[0.001, 100.0],
     time_step_rank=4)  # fmt: skip
_add("nemotron_h", MOE, MAMBA2, ssm_state_size=16, conv_kernel=4, n_groups=1,
     layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True,
     hybrid_override_pattern="M-*MEM*E", num_hidden_layers=8,
     moe_shared_expert_intermediate_size=16, time_step_limit=[0.001, 100.0])  # fmt: skip
_add("olmo_hybrid", GATED_DELTA, linear_num_key_heads=4, linear_allow_neg_eigval=True,
     layer_types=["linear_attention", FULL, "linear_attention", FULL])  # fmt: skip
_add("plamo2", MAMBA2, hidden_size_per_head=8, mamba_step=2, attention_window_size=64,
     full_attention_idx=[], mamba_head_dim=16)  # fmt: skip
_add("qwen3_next", MOE, GATED_DELTA, partial_rotary_factor=0.5, full_attention_interval=2)
QWEN35 = {**GATED_DELTA, "full_attention_interval": 2}
_add("prism_hadamard_qwen35", schema_version=1, tensor_namespace="mlx-lm-text",
     quantization={"bits": 2, "group_size": 128, "mode": "affine"},
     modules=[{"path": f"model.layers.{i}.mlp.up_proj", "block": 0, "embedding": False,
               "dtype": "float16"} for i in (1, 2)],
     text_config=_text(QWEN35, hidden_size=128, model_type="qwen3_5_text"))  # fmt: skip
_add("qwen3_5", text_config=_text(QWEN35, model_type="qwen3_5_text"))
_add("qwen3_5_moe", text_config=_text(MOE, QWEN35, model_type="qwen3_5_moe_text"))
_add("recurrent_gemma", conv1d_width=4, logits_soft_cap=30.0, attention_window_size=4,
     num_key_value_heads=1, block_types=["recurrent", "recurrent", "attention"],
     num_hidden_layers=6)  # fmt: skip
_add("rwkv7", norm_eps=1e-5, a_low_rank_dim=4, v_low_rank_dim=4, gate_low_rank_dim=4,
     decay_low_rank_dim=4)  # fmt: skip

# Key-value caches shared between layers.
_add("afm7", hidden_dim=32, num_layers=4, num_kv_reuse_layers=2, num_heads=4, num_kv_heads=2)
_add("gemma3n", text_config=_text(
    model_type="gemma3n_text", num_kv_shared_layers=2, vocab_size_per_layer_input=128,
    sliding_window=4, rope_local_base_freq=10000.0, final_logit_softcapping=30.0,
    num_hidden_layers=6, layer_types=[SLIDING, FULL] * 3,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
    hidden_size_per_layer_input=8, altup_num_inputs=2, altup_coef_clip=120.0,
    altup_correct_scale=True, altup_active_idx=0, laurel_rank=4))  # fmt: skip
GEMMA4 = {
    "global_head_dim": 16, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
    "sliding_window": 4, "sliding_window_pattern": 2, "num_kv_shared_layers": 0,
}  # fmt: skip
_add("gemma4_text", GEMMA4, num_kv_shared_layers=2, num_hidden_layers=6)
_add("gemma4", text_config=_text(GEMMA4, model_type="gemma4_text"))


def new(model_type: str) -> nn.Module:
    """The mlx-lm model of `CONFIGS[model_type]`, its parameters lazy and not yet randomised."""
    model_class, args_class = _get_classes(CONFIGS[model_type])
    return model_class(args_class.from_dict(CONFIGS[model_type])).eval()


@lru_cache(maxsize=2)
def _weights(model_type: str, seed: int) -> list[tuple[str, mx.array]]:
    weights = []
    mx.random.seed(seed)  # some modules draw a bias or a decay themselves
    for name, value in tree_flatten(new(model_type).parameters()):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if mx.issubdtype(value.dtype, mx.floating):
            noise = rng.standard_normal(value.shape, dtype=np.float32)
            # Matrices get the scale that keeps activations of order one; vectors stay near the
            # value that the module gives them.
            noise = noise / value.shape[-1] ** 0.5 if value.ndim > 1 else 0.2 * noise
            start = 0 if value.ndim > 1 else value
            weights.append((name, (start + mx.array(noise)).astype(value.dtype)))
        elif value.dtype == mx.uint32:  # packed quantized weights
            packed = rng.integers(0, 2**32, value.shape, dtype=np.uint32)
            weights.append((name, mx.array(packed)))
        else:
            weights.append((name, value))
    mx.eval(weights)
    return weights


def build(model_type: str, seed: int = 0) -> nn.Module:
    """The model with deterministic random float32 weights, the same for every call.

    Norms, biases and gates that the module fills with constants are shaken too: a cut that drops or
    swaps one of them must show.
    """
    model = new(model_type)
    model.load_weights(_weights(model_type, seed))
    return model
