"""Adapters: what is loaded gives the logits of mlx-lm's load_adapters and of PEFT on torch, and
what has no exact place is refused by name. tests/mpi/test_adapters.py is about layouts.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from safetensors.numpy import save_file

from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.adapter_files import MLX_WEIGHTS, open_adapter
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from tests.test_loader import save, save_quantized
from tests.test_skeleton import EXPERTS
from tests.tiny_configs import CONFIGS, build
from tests.twin import load_twin, save_checkpoint

ALONE = Mesh(ParallelDims(), Communicator())
TOKENS = mx.array([[5, 9, 77, 3, 3, 40, 1]])
LINEARS = (nn.Linear, nn.QuantizedLinear)
SWITCHES = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def layer_keys(model: nn.Module, kinds: tuple) -> list[str]:
    """Paths, within a layer, of the modules that can be adapted."""
    modules = [item for layer in model.layers for item in layer.named_modules()]
    return sorted({path for path, module in modules if isinstance(module, kinds)})


def noise(shape, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def save_mlx_adapter(folder: Path, model: nn.Module, kind: str = "lora", ends: bool = True) -> Path:
    """An adapter as mlx_lm.lora writes it, random, on everything that it can adapt.

    `model` is changed. `ends` adapts the embedding and the head, where there is one, as well.
    """
    folder.mkdir()
    num_layers = len(model.layers)
    settings = {"rank": 3, "scale": 2.5, "dropout": 0.1}
    if kind == "full":
        packed = [path for path, module in model.named_modules() if "scales" in module]
        weights = {
            name: value + 0.3 * noise(value.shape, i) / value.shape[-1] ** 0.5
            for i, (name, value) in enumerate(tree_flatten(model.parameters()))
            if "layers.0." not in name and name.rpartition(".")[0] not in packed
        }
    else:
        kinds = (*LINEARS, *EMBEDDINGS) + (SWITCHES if kind == "lora" else ())
        settings["keys"] = layer_keys(model, kinds)
        if ends:
            outside = [p for p, m in model.named_modules() if isinstance(m, kinds)]
            settings["keys"] += [p for p in outside if "layers" not in p]
        linear_to_lora_layers(model, num_layers, settings, use_dora=kind == "dora")
        weights = {}
        for i, (name, value) in enumerate(tree_flatten(model.parameters())):
            role = name.rpartition(".")[2]
            if role in ("lora_a", "lora_b"):
                weights[name] = 0.1 * noise(value.shape, i)
            elif role == "m":
                weights[name] = value * (1 + 0.2 * noise(value.shape, i))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def logits(model) -> np.ndarray:
    return np.array(model(TOKENS).astype(mx.float32))


def load(path: Path, **options):
    return load_model(open_checkpoint(path), ALONE, **options)


def plain(tmp_path: Path, name: str, **changes) -> Path:
    model = build(name)
    config = CONFIGS[name] | changes
    if config.get("tie_word_embeddings"):
        model.pop("lm_head")
    return save_checkpoint(model, config, tmp_path / "model")


MLX_CASES = [
    ("llama", "lora", {}),
    ("llama", "lora", {"tie_word_embeddings": True}),
    ("llama", "dora", {}),
    ("llama", "dora", {"tie_word_embeddings": True}),
    ("llama", "full", {}),
    ("qwen2", "dora", {}),  # biases
    ("qwen3", "lora", {}),
    ("gemma3_text", "lora", {}),
    ("gemma3_text", "dora", {}),
    ("gemma3_text", "full", {}),
    ("qwen3_moe", "lora", {}),
    ("qwen3_moe", "dora", {}),
    ("mixtral", "lora", {}),
    ("gpt_oss", "lora", {}),  # experts with biases
]


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    MLX_CASES,
    ids=lambda x: x if isinstance(x, str) else "tied" if x else "",
)
def test_mlx_lm_adapters(tmp_path, name, kind, changes):
    path = plain(tmp_path, name, **changes)
    adapter = save_mlx_adapter(tmp_path / "adapter", load_twin(path), kind)
    twin = load_adapters(load_twin(path), str(adapter)).eval()
    loaded = load(path, adapter=adapter)
    assert np.abs(logits(twin) - logits(load_twin(path))).max() > 0.05  # it does something
    np.testing.assert_allclose(logits(loaded.stage), logits(twin), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("packing", "kind"),
    [
        ("affine4", "lora"),
        ("affine4", "dora"),
        ("affine4", "full"),
        ("affine8", "dora"),
        ("mxfp4", "lora"),  # whose scales do not say what dtype it computes in
    ],
)
def test_a_packed_base_stays_packed(tmp_path, packing, kind):
    path = save_quantized(tmp_path / "model", packing)
    # mlx-lm's own DoRA takes the norm of a packed embedding's integers, so that is left out.
    adapter = save_mlx_adapter(tmp_path / "adapter", load_twin(path), kind, ends=kind == "lora")
    twin = load_adapters(load_twin(path), str(adapter)).eval()
    kept = load(path, adapter=adapter, weights="keep", dtype="checkpoint")
    assert "scales" in kept.stage.model.model.layers[0].self_attn.q_proj
    np.testing.assert_allclose(logits(kept.stage), logits(twin), rtol=0, atol=2e-5)
    unpacked = load(path, adapter=adapter, weights="dequantize")
    # mlx-lm unpacks an embedding of mxfp4 into bfloat16.
    atol = 3e-2 if packing == "mxfp4" else 1e-4
    np.testing.assert_allclose(logits(unpacked.stage), logits(twin), rtol=0, atol=atol)


def test_factors_take_the_dtype_of_their_module(tmp_path):
    path = plain(tmp_path, "llama")
    adapter = save_mlx_adapter(tmp_path / "adapter", load_twin(path), "dora")
    loaded = load(path, adapter=adapter, dtype="bfloat16")
    dtypes = {a.dtype for _, a in tree_flatten(loaded.stage.model.parameters())}
    assert dtypes == {mx.bfloat16}
    assert loaded.stage(TOKENS).dtype == mx.bfloat16
    twin = load_adapters(load_twin(path), str(adapter)).eval()
    np.testing.assert_allclose(logits(loaded.stage), logits(twin), rtol=0, atol=0.3)


def test_what_is_on_is_said(tmp_path):
    path = plain(tmp_path, "llama")
    assert "adapter" not in str(load(path))
    lora = save_mlx_adapter(tmp_path / "mine", load_twin(path))
    assert str(load(path, adapter=lora)).endswith("adapter mine: LoRA of rank 3 on 30 modules")
    full = save_mlx_adapter(tmp_path / "all", load_twin(path), "full")
    assert str(load(path, adapter=full)).endswith("adapter all: 30 tensors replaced")


def test_a_numbered_file_of_a_training_run(tmp_path):
    path = plain(tmp_path, "llama")
    adapter = save_mlx_adapter(tmp_path / "adapter", load_twin(path))
    (adapter / "adapters.safetensors").rename(adapter / "0000100_adapters.safetensors")
    with pytest.raises(ConfigError, match=r"adapters\.safetensors is missing"):
        load(path, adapter=adapter)
    loaded = load(path, adapter=adapter / "0000100_adapters.safetensors")
    assert "30 modules" in str(loaded)


# -- PEFT --


@pytest.fixture(scope="session")
def peft():
    pytest.importorskip("torch", reason="NOT CHECKED: PEFT's adapters (pip install torch peft)")
    return pytest.importorskip("peft", reason="NOT CHECKED: PEFT's adapters (pip install peft)")


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_CASES = {
    "lora": ({}, {"target_modules": PROJECTIONS}),
    "ends": ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied": (
        {"tie_word_embeddings": True},
        {"target_modules": ["down_proj", "embed_tokens"]},
    ),
    "patterns": (
        {},
        {
            "target_modules": PROJECTIONS,
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {r"^model\.layers\.[02]\..*_proj": 3},
        },
    ),
    "dora": (
        {"attention_bias": True},
        {"target_modules": [*PROJECTIONS, "lm_head"], "use_dora": True, "bias": "all"},
    ),
    "saved": (
        {"attention_bias": True},
        {
            "target_modules": ["q_proj"],
            "bias": "lora_only",
            "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"],
        },
    ),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_adapters(tmp_path, peft, case):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    changes, settings = PEFT_CASES[case]
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIGS["llama"] | changes)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    base.save_pretrained(tmp_path / "model")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=9, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    twin = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
        tmp_path / "adapter",
    ).eval()
    tokens = torch.tensor(TOKENS.tolist())
    with torch.no_grad():
        expected = twin(tokens).logits.numpy()
        without = twin.get_base_model().eval()
        with twin.disable_adapter():
            assert np.abs(without(tokens).logits.numpy() - expected).max() > 0.05
    loaded = load(tmp_path / "model", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(logits(loaded.stage), expected, rtol=0, atol=3e-5)


def save_peft_adapter(folder: Path, tensors: dict[str, np.ndarray], **settings) -> Path:
    """An adapter in PEFT's layout, from tensors named as Hugging Face names modules."""
    folder.mkdir()
    named = {f"base_model.model.{n}": np.ascontiguousarray(a) for n, a in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7.5} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def to_peft(adapter: Path, name: str) -> dict[str, np.ndarray]:
    """The tensors of an mlx-lm adapter with the names and layouts of PEFT, experts one by one."""
    prefix, template, names = EXPERTS[name]
    result = {}
    for key, array in mx.load(str(adapter / "adapters.safetensors")).items():
        module, _, role = key.rpartition(".")
        if module.endswith("embed_tokens"):
            factor = "lora_embedding_A" if role == "lora_a" else "lora_embedding_B"
            result[f"{module}.{factor}"] = np.array(array.T)
            continue
        factor = "lora_A.weight" if role == "lora_a" else "lora_B.weight"
        if prefix in key:
            start, own = module[: module.index(prefix)], module.rpartition(".")[2]
            for expert in range(array.shape[0]):
                one = template.format(expert=expert, name=names[own]).removesuffix("weight")
                result[f"{start}{one}{factor}"] = np.array(array[expert])
        else:
            result[f"{module}.{factor}"] = np.array(array.T)
    return result


@pytest.mark.parametrize("base", ["stacked", "one by one"])
@pytest.mark.parametrize("name", EXPERTS)
def test_peft_adapters_of_experts(tmp_path, name, base):
    model = build(name)
    path = save_checkpoint(model, CONFIGS[name], tmp_path / "model")
    adapter = save_mlx_adapter(tmp_path / "mlx", load_twin(path))
    twin = load_adapters(load_twin(path), str(adapter)).eval()
    if base == "one by one":
        path = save(tmp_path / "hub", CONFIGS[name], unstack(model, name))
    loaded = load(path, adapter=save_peft_adapter(tmp_path / "peft", to_peft(adapter, name)))
    np.testing.assert_allclose(logits(loaded.stage), logits(twin), rtol=0, atol=2e-5)


def unstack(model: nn.Module, name: str) -> dict[str, mx.array]:
    """The weights with one tensor per expert and projection, as the hub has them."""
    prefix, template, names = EXPERTS[name]
    weights = {}
    for path, array in tree_flatten(model.parameters()):
        if prefix in path:
            own = path.removesuffix(".weight").rpartition(".")[2]
            for expert in range(array.shape[0]):
                one = template.format(expert=expert, name=names[own])
                weights[path[: path.index(prefix)] + one] = mx.contiguous(array[expert])
        else:
            weights[path] = array
    return weights


# -- what is refused --

Q_PROJ = "model.layers.1.self_attn.q_proj"
A, B = np.ones((3, 32), np.float32), np.ones((32, 3), np.float32)


def mlx_tensors(module: str = Q_PROJ, a=A.T, b=B.T) -> dict[str, np.ndarray]:
    return {f"{module}.lora_a": a, f"{module}.lora_b": b}


def peft_tensors(module: str = Q_PROJ, a=A, b=B) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def save_mlx(folder: Path, tensors: dict[str, np.ndarray], **settings) -> Path:
    folder.mkdir()
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / MLX_WEIGHTS)
    config = {"num_layers": 4, "lora_parameters": {"rank": 3, "scale": 2.0}} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def both(**change) -> dict[str, np.ndarray]:
    return mlx_tensors() | mlx_tensors("model.layers.2.self_attn.q_proj", **change)


MLX_REFUSED = {
    "nothing": ("llama", {}, {}, "has no tensors"),
    "no such layer": ("llama", mlx_tensors("model.layers.9.mlp.up_proj"), {}, "layers.9.mlp"),
    "another shape": ("llama", both(b=B.T[:, :31]), {}, r"layers.2.*lora_b has shape \(3, 31\)"),
    "another rank": ("llama", both(a=A.T[:, :2], b=B.T[:2]), {}, r"layers.2.*lora_a has shape"),
    "half a pair": ("llama", {f"{Q_PROJ}.lora_a": A.T}, {}, "q_proj.lora_a, which is not a whole"),
    "a magnitude in LoRA": ("llama", mlx_tensors() | {f"{Q_PROJ}.m": A[0]}, {}, "not a whole LoRA"),
    "no magnitude": ("llama", mlx_tensors(), {"fine_tune_type": "dora"}, "not a whole DoRA"),
    "a stray tensor": ("llama", mlx_tensors() | {"x.weight": A}, {}, "tensor x.weight"),
    "a norm": ("llama", mlx_tensors("model.norm"), {}, "model.norm.lora_a.*a RMSNorm"),
    "integers": ("llama", both(a=np.ones((32, 3), np.int32)), {}, "layers.2.*floating point"),
    "another kind": ("llama", mlx_tensors(), {"fine_tune_type": "vera"}, "'vera' is not one of"),
    "no scale": ("llama", mlx_tensors(), {"lora_parameters": {"rank": 3}}, "scale=None"),
    "rank zero": ("llama", mlx_tensors(), {"lora_parameters": {"rank": 0, "scale": 1}}, "rank=0"),
    "full, unknown": ("llama", {"x.weight": A}, {"fine_tune_type": "full"}, "tensor x.weight"),
    "full, shape": ("llama", {f"{Q_PROJ}.weight": A}, {"fine_tune_type": "full"}, "has shape"),
    "DoRA on experts": (
        "qwen3_moe",
        {
            "model.layers.1.mlp.switch_mlp.up_proj.lora_a": np.ones((4, 3, 32), np.float32),
            "model.layers.1.mlp.switch_mlp.up_proj.lora_b": np.ones((4, 16, 3), np.float32),
            "model.layers.1.mlp.switch_mlp.up_proj.m": np.ones((4, 16), np.float32),
        },
        {"fine_tune_type": "dora"},
        "put DoRA on .*switch_mlp.up_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MLX_REFUSED)
def test_mlx_lm_adapters_that_are_refused(tmp_path, case):
    name, tensors, settings, message = MLX_REFUSED[case]
    refused(plain(tmp_path, name), save_mlx(tmp_path / "adapter", tensors, **settings), message)


def refused(path: Path, adapter: Path, message: str, **options) -> None:
    checkpoint = open_checkpoint(path)
    with pytest.raises(ConfigError, match=message) as error:
        load_model(checkpoint, ALONE, adapter=adapter, **options)
    assert f"model.adapter={adapter}" in str(error.value) and "\n" not in str(error.value)
    assert checkpoint.bytes_read == 0


EMBEDDING = {
    "model.embed_tokens.lora_embedding_A": np.ones((3, 128), np.float32),
    "model.embed_tokens.lora_embedding_B": np.ones((32, 3), np.float32),
}
SAVED_EMBEDDING = {"model.embed_tokens.weight": np.ones((128, 32), np.float32)}
EXPERT = "model.layers.1.mlp.experts.{}.up_proj"
PEFT_REFUSED = {
    "another method": ("llama", peft_tensors(), {"peft_type": "IA3"}, "'IA3' is not supported"),
    "a variant": ("llama", peft_tensors(), {"use_qalora": True}, "use_qalora=true"),
    "a future variant": ("llama", peft_tensors(), {"use_magic": {"x": 1}}, "use_magic="),
    "tied by PEFT": ("tied", EMBEDDING, {"ensure_weight_tying": True}, "ensure_weight_tying"),
    "a changed base": ("llama", peft_tensors(), {"init_lora_weights": "pissa"}, "'pissa' has"),
    "a bad pattern": ("llama", peft_tensors(), {"rank_pattern": {"(": 2}}, "rank_pattern has"),
    "no number": ("llama", peft_tensors(), {"lora_alpha": "8"}, "lora_alpha of .*'8'"),
    "no such module": ("llama", peft_tensors("model.layers.1.mlp.fc1"), {}, "no module .*mlp.fc1"),
    "another shape": ("llama", peft_tensors(b=B[:31]), {}, r"lora_B.weight has shape \(31, 3\)"),
    "another rank": ("llama", peft_tensors(), {"rank_pattern": {"q_proj": 4}}, "has shape"),
    "a convolution": ("llama", peft_tensors(a=A[:, :, None]), {}, "is not a matrix"),
    "a bias in LoRA": (
        "llama", peft_tensors() | {f"{Q_PROJ}.lora_B.bias": A[0]}, {}, "lora_B.bias is of a kind",
    ),
    "two for one": (
        "llama",
        {f"{Q_PROJ}.weight": A, f"{Q_PROJ}.base_layer.weight": A}, {}, "for the same place",
    ),
    "a tied head": ("tied", peft_tensors("lm_head", b=np.ones((128, 3))), {}, "lm_head.* no place"),
    "an untied embedding": ("tied", SAVED_EMBEDDING, {}, "is the output head as well"),
    "DoRA on an embedding": (
        "llama",
        EMBEDDING | {"model.embed_tokens.lora_magnitude_vector": A[0]},
        {"use_dora": True}, "put DoRA on model.embed_tokens",
    ),
    "a split projection": (
        "deepseek_v3",
        peft_tensors(
            "model.layers.1.self_attn.kv_b_proj", a=np.ones((3, 16)), b=np.ones((64, 3)),
        ),
        {}, "kv_b_proj.lora_A.weight .*only a part of",
    ),
    "some experts": (
        "qwen3_moe",
        {k: v for e in (0, 1) for k, v in peft_tensors(EXPERT.format(e), b=B[:16]).items()},
        {}, "has to adapt all of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT_REFUSED)
def test_peft_adapters_that_are_refused(tmp_path, case):
    name, tensors, settings, message = PEFT_REFUSED[case]
    tied = {"tie_word_embeddings": True} if name == "tied" else {}
    path = plain(tmp_path, "llama" if tied else name, **tied)
    tensors = {n: a.astype(np.float32) for n, a in tensors.items()}
    refused(path, save_peft_adapter(tmp_path / "adapter", tensors, **settings), message)


def test_experts_of_different_ranks_are_refused(tmp_path):
    path = plain(tmp_path, "mixtral")
    adapter = save_mlx_adapter(tmp_path / "mlx", load_twin(path), ends=False)
    tensors = to_peft(adapter, "mixtral")
    for name in tensors:
        if ".layers.1." in name and ".experts.2.w1." in name:
            tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
    settings = {"rank_pattern": {"layers.1.block_sparse_moe.experts.2.w1": 2}}
    refused(path, save_peft_adapter(tmp_path / "peft", tensors, **settings), "different ranks")


def test_packed_weights_are_not_replaced(tmp_path):
    path = save_quantized(tmp_path / "model", "affine8")
    tensors = {f"{Q_PROJ}.weight": np.ones((96, 64), np.float32)}
    adapter = save_mlx(tmp_path / "adapter", tensors, fine_tune_type="full")
    refused(path, adapter, "model.weights=dequantize", weights="keep")
    whole = load(path, adapter=adapter, weights="dequantize").stage.model
    assert mx.all(whole.model.layers[1].self_attn.q_proj.weight == 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "adapter_config.json is missing"),
        ("{", "not a readable adapter configuration"),
        ("[1]", "not a JSON object"),
        ('{"r": 8}', "lora_parameters is missing"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, message):
    save_mlx(tmp_path / "adapter", mlx_tensors())
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    if config is not None:
        (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        open_adapter(tmp_path / "adapter")


def test_a_pickle_is_never_opened(tmp_path):
    adapter = save_peft_adapter(tmp_path / "adapter", peft_tensors())
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin is a pickle"):
        open_adapter(adapter)


def test_a_truncated_file(tmp_path):
    adapter = save_mlx(tmp_path / "adapter", mlx_tensors())
    data = (adapter / MLX_WEIGHTS).read_bytes()
    (adapter / MLX_WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match="copy the file again"):
        open_adapter(adapter)
