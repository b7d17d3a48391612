"""Which module of which model is cut how: the tables behind tensor parallelism.

A plan maps paths of an mlx-lm model to rules (`parallel/rules.py`): `*` is one path component, a
trailing `?` marks what not every configuration has. To add a model, write its table and add it to
the matrix of `tests/test_tensor.py`; what a table forgets is refused at start.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlx_lm.utils import MODEL_REMAPPING

from hpcmlx.errors import ConfigError
from hpcmlx.parallel.rules import (
    Attention,
    Block,
    Colwise,
    PerHead,
    Plan,
    Replicate,
    Rowwise,
    Rule,
    VocabEmbedding,
    VocabHead,
)

Table = Mapping[str, Rule]


def under(prefix: str, table: Table) -> dict[str, Rule]:
    """`table` with `prefix` before every path; the empty path is the prefix itself."""
    return {f"{prefix}.{path}" if path else prefix: rule for path, rule in table.items()}


# Attentions

QKVO: Table = {
    "q_proj": Colwise("query"),
    "k_proj": Colwise("key_value"),
    "v_proj": Colwise("key_value"),
    "o_proj": Rowwise("query"),
}
ATTENTION: Table = {"": Attention("n_heads", "n_kv_heads"), **QKVO}
HEAD_NORMS: Table = {"q_norm": Replicate(), "k_norm": Replicate()}  # over head_dim
FUSED_ATTENTION: Table = {
    "": Attention("n_heads", "n_kv_heads"),
    "qkv_proj": Colwise("query_key_value"),
    "o_proj": Rowwise("query"),
}
SINK_ATTENTION: Table = {
    "": Attention("num_attention_heads", "num_key_value_heads", "num_key_value_groups"),
    **QKVO,
    "sinks": PerHead(),
}
LATENT_ATTENTION: Table = {
    "": Attention("num_heads"),
    "q_proj?": Colwise("query"),  # instead of the next three, without q_lora_rank
    "q_a_proj?": Replicate(),
    "q_a_layernorm?": Replicate(),
    "q_b_proj?": Colwise("query"),
    "kv_a_proj_with_mqa": Replicate(),
    "kv_a_layernorm": Replicate(),
    "embed_q": PerHead(),
    "unembed_out": PerHead(),
    "o_proj": Rowwise("query"),
}

# MLPs and mixtures of experts

GATE_UP_DOWN: Table = {
    "gate_proj": Colwise("hidden"),
    "up_proj": Colwise("hidden"),
    "down_proj": Rowwise("hidden"),
}
MLP: Table = {"": Block(), **GATE_UP_DOWN}
FUSED_MLP: Table = {
    "": Block(),
    "gate_up_proj": Colwise("gate_up"),
    "down_proj": Rowwise("hidden"),
}
MIXTURE: Table = {"": Block(), "gate": Replicate(), **under("switch_mlp", GATE_UP_DOWN)}
OAI_MIXTURE: Table = {"": Block(), "router": Replicate(), **under("experts", GATE_UP_DOWN)}


def optional(table: Table) -> dict[str, Rule]:
    """`table` with every path marked as one that need not be there, except the empty one."""
    return {f"{path.rstrip('?')}?" if path else path: rule for path, rule in table.items()}


# Some layers dense, some sparse: either kind of layer may be the only one.
DENSE_OR_MIXTURE: Table = {
    "": Block(),
    **optional(GATE_UP_DOWN),
    **optional({"gate": Replicate(), **under("switch_mlp", GATE_UP_DOWN)}),
    **optional(under("shared_experts", GATE_UP_DOWN)),
}

# Norms of a layer

NORMS: Table = {"input_layernorm": Replicate(), "post_attention_layernorm": Replicate()}
SANDWICH_NORMS: Table = {
    **NORMS,
    "pre_feedforward_layernorm": Replicate(),
    "post_feedforward_layernorm": Replicate(),
}


def decoder(attention: Table, mlp: Table, *, norms: Table = NORMS, mlp_at: str = "mlp") -> Table:
    """A decoder-only model: embedding, layers, norm, and a head unless that is the embedding."""
    layer = {**under("self_attn", attention), **under(mlp_at, mlp), **norms}
    return {
        "model.embed_tokens": VocabEmbedding(),
        **under("model.layers.*", layer),
        "model.norm": Replicate(),
        "lm_head?": VocabHead(),
    }


DEEPSEEK_V3 = decoder(LATENT_ATTENTION, DENSE_OR_MIXTURE)

PLANS: Mapping[str, Table] = {
    "deepseek_v3": DEEPSEEK_V3,
    "gemma2": decoder(
        {**ATTENTION, "": Attention("n_heads", "n_kv_heads", "repeats")}, MLP, norms=SANDWICH_NORMS
    ),
    "gemma3_text": decoder(
        {**ATTENTION, **HEAD_NORMS, "": Attention("n_heads", "n_kv_heads", "repeats")},
        MLP,
        norms=SANDWICH_NORMS,
    ),
    "gpt_oss": decoder(SINK_ATTENTION, OAI_MIXTURE),
    "kimi_k25": under("language_model", DEEPSEEK_V3),
    "llama": decoder(ATTENTION, MLP),
    "mixtral": decoder(
        {**ATTENTION, "": Attention("num_heads", "num_key_value_heads")},
        MIXTURE,
        mlp_at="block_sparse_moe",
    ),
    "phi3": decoder(FUSED_ATTENTION, FUSED_MLP),
    "qwen2": decoder(ATTENTION, MLP),
    "qwen3": decoder({**ATTENTION, **HEAD_NORMS}, MLP),
    "qwen3_moe": decoder({**ATTENTION, **HEAD_NORMS}, DENSE_OR_MIXTURE),
}


def plan_for(model_type: str) -> Plan:
    """The plan of a model type as its `config.json` names it; mlx-lm's aliases are followed
    (`mistral` is a llama, `kimi_k2` a deepseek_v3).

    Raises:
        ConfigError: there is none.
    """
    table = PLANS.get(MODEL_REMAPPING.get(model_type, model_type))
    if table is None:
        raise ConfigError(
            f"no tensor-parallel plan for model type {model_type!r} (there are plans for "
            f"{', '.join(sorted(PLANS))}); set parallel.tp=1 and use parallel.pp"
        )
    return Plan(model_type, table)
