"""Exports of a training run: the library that owns a format loads them and gives the logits that
the trained model itself gave. tests/test_adapters.py is about reading adapters.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters

from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError, IntegrityError, OutputError, StorageError
from hpcmlx.inference.manifest import fingerprint
from hpcmlx.models.byteranges import ByteFile
from hpcmlx.models.checkpoint import open_checkpoint, read_header
from hpcmlx.models.checksums import verify, write_checksums
from hpcmlx.rundir import lock_run_dir
from hpcmlx.training.checkpoints.pieces import Piece
from hpcmlx.training.checkpoints.store import CheckpointStore
from hpcmlx.training.export.adapters import export_mlx_adapter, export_peft
from hpcmlx.training.export.files import Group, Part, write_weights
from hpcmlx.training.export.merged import export_merged
from hpcmlx.training.methods import Method
from tests.fixtures import ROOT, save_model
from tests.test_adapters import TOKENS, load, logits, plain
from tests.test_gguf import values_of
from tests.test_gguf import write as write_gguf
from tests.test_loader import save_quantized
from tests.test_tokenizer import metadata
from tests.tiny_configs import CONFIGS
from tests.twin import load_twin, save_checkpoint

JOB = ROOT / "jobs" / "export.py"


class Stub:
    """A training checkpoint that is a dict."""

    def __init__(self, parameters: Mapping[str, mx.array], method: Mapping[str, Any]):
        self._arrays = {f"param/{name}": array for name, array in parameters.items()}
        self._arrays["adam_m/x"] = mx.zeros((2,))  # other things are none of the export's business
        self.tensors = {name: (a.shape, a.dtype) for name, a in self._arrays.items()}
        self.state = {"method": dict(method)}

    def read(self, name: str) -> mx.array:
        return self._arrays[name]


def train(path: Path, kind: str = "lora", **options: Any) -> tuple[Stub, np.ndarray]:
    """What a training run would leave, and the logits of the model that it had trained."""
    method = Method(kind, rank=3, scale=2.5, **options)
    loaded = load(path, adapter=method.attach(), dtype="float32", weights="dequantize")
    model = loaded.stage.model
    before = logits(loaded.stage)
    rng = np.random.default_rng(0)
    parameters = dict(tree_flatten(model.parameters()))
    trained = {}
    for name in method.trained(model, parameters):
        noise = mx.array(rng.standard_normal(parameters[name].shape).astype(np.float32))
        if name.endswith(("lora_down", "lora_up")):
            trained[name] = 0.1 * noise
        else:
            trained[name] = parameters[name] * (1 + 0.2 * noise)
    model.update(tree_unflatten(list(trained.items())))
    after = logits(loaded.stage)
    assert np.abs(after - before).max() > 0.05  # it does something
    return Stub(trained, {"kind": kind, "rank": method.rank, "scale": method.scale}), after


def assert_gives(model: nn.Module, expected: np.ndarray, atol: float = 3e-5) -> None:
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=atol)


ENDS = ("*", "embed_tokens", "lm_head", "model.embed_tokens")
TIED = {"tie_word_embeddings": True}
CASES = [
    ("llama", "lora", {}, {"modules": ENDS}),
    ("llama", "lora", TIED, {"modules": ENDS}),
    ("llama", "dora", {}, {"num_layers": 2}),
    ("qwen2", "dora", {}, {"num_layers": 1}),  # biases
    ("qwen3", "lora", {}, {"modules": ("self_attn.[qv]_proj", "model.layers.1.mlp.up_proj")}),
    ("gemma3_text", "dora", {}, {"num_layers": 2}),
    ("qwen3_moe", "lora", {}, {}),
    ("llama", "full", {}, {"num_layers": 1}),
]  # fmt: skip
IDS = [f"{n}-{k}" + ("-tied" if c else "") for n, k, c, _ in CASES]


@pytest.mark.parametrize(("name", "kind", "changes", "options"), CASES, ids=IDS)
def test_mlx(tmp_path, name, kind, changes, options):
    """An adapter and a merged model, as mlx-lm loads them and as this project does."""
    base = plain(tmp_path, name, **changes)
    trained, expected = train(base, kind, **options)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    export_mlx_adapter(trained, base, adapter)
    assert_gives(load_adapters(load_twin(base), str(adapter)).eval(), expected)
    assert_gives(load(base, adapter=adapter).stage, expected)
    report = export_merged(trained, base, merged, max_shard_bytes=20_000)
    assert_gives(load_twin(merged), expected)
    assert verify(merged)
    assert_gives(load(merged).stage, expected)
    shards = list(merged.glob("model-*.safetensors"))
    assert len(shards) > 3 and (merged / "model.safetensors.index.json").exists()
    assert sum(file.stat().st_size for file in shards) > report.num_bytes
    assert not list(tmp_path.glob(".*"))


def test_keys_of_mlx_adapters(tmp_path):
    """Short keys in the last layers where they say it all, whole paths elsewhere."""
    base = plain(tmp_path, "llama")
    cases = {
        ("self_attn.q_proj", "lm_head"): (4, ["lm_head", "self_attn.q_proj"]),
        ("model.layers.[23].mlp.*",): (2, ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        ("model.layers.1.mlp.up_proj",): (4, ["model.layers.1.mlp.up_proj"]),
    }
    for number, (modules, wanted) in enumerate(cases.items()):
        out = tmp_path / str(number)
        export_mlx_adapter(train(base, modules=modules)[0], base, out)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["num_layers"], config["lora_parameters"]["keys"]) == wanted


# -- packed bases --


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_packed_base(tmp_path, kind):
    base = save_quantized(tmp_path / "model", "affine4")
    trained, expected = train(base, kind, num_layers=1)
    export_mlx_adapter(trained, base, tmp_path / "adapter")
    assert_gives(load_adapters(load_twin(base), str(tmp_path / "adapter")).eval(), expected, 1e-4)
    report = export_merged(trained, base, tmp_path / "merged", dtype="float32")
    assert report.notes == ("what is packed in the base is unpacked here",)
    assert_gives(load_twin(tmp_path / "merged"), expected, 1e-4)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization" not in config and config["torch_dtype"] == "float32"


def test_packing_again(tmp_path):
    base = save_quantized(tmp_path / "model", "affine4")
    trained, expected = train(base, num_layers=1)
    errors = []
    for bits in (4, 8):
        out = tmp_path / str(bits)
        report = export_merged(trained, base, out, quantize={"bits": bits, "group_size": 64})
        twin, ours = load_twin(out), load(out, weights="dequantize")
        assert twin.model.layers[0].self_attn.q_proj.bits == bits
        errors.append(np.abs(logits(twin) - expected).max())
        assert_gives(ours.stage, logits(twin), 1e-4)
        assert report.notes[0].startswith("packing has changed the weights by ")
    assert errors[1] < 0.3 * errors[0] < 0.3
    # What was packed so and was not trained is the base's, to the bit.
    stored, found = (dict(tree_flatten(load_twin(p).parameters())) for p in (base, tmp_path / "4"))
    changed = {n for n in found if not mx.array_equal(stored[n], found[n])}
    trained_modules = {n.removeprefix("param/") for n in trained.tensors if n.endswith("lora_up")}
    assert stored.keys() == found.keys()
    assert {f"{name.rpartition('.')[0]}.lora_up" for name in changed} == trained_modules


def test_dtypes(tmp_path):
    base = plain(tmp_path, "llama")
    trained, expected = train(base)
    export_merged(trained, base, tmp_path / "half", dtype="bfloat16")
    half = load_twin(tmp_path / "half")
    assert {a.dtype for _, a in tree_flatten(half.parameters())} == {mx.bfloat16}
    assert_gives(half, expected, 0.3)


# -- Hugging Face --


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch", reason="NOT CHECKED: Hugging Face's formats (pip install torch)")
    pytest.importorskip("peft", reason="NOT CHECKED: PEFT's adapters (pip install peft)")
    return pytest.importorskip("transformers")


HUB = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    # mlx-lm rounds the root of the hidden size to bfloat16: this one has a whole root.
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {"query_pre_attn_scalar": 8, "tie_word_embeddings": True, "hidden_size": 64},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {"intermediate_size": 16}),
}  # fmt: skip


def save_hub(transformers, name: str, path: Path, **changes: Any) -> Path:
    """A random model of transformers, as it saves it."""
    import torch

    kind, own = HUB[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**CONFIGS[name] | own | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    # transformers 5 has other names for some keys than mlx-lm reads.
    config = CONFIGS[name] | own | json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config))
    return path


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS.tolist())).logits.float().numpy()


def torch_model(transformers, path: Path):
    import torch

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


HUB_CASES = [
    ("llama", "lora", ENDS),
    ("llama", "dora", ("model.layers.[23].*",)),
    ("qwen3", "lora", ("self_attn.[qv]_proj", "model.layers.1.mlp.up_proj")),
    ("gemma3_text", "dora", ("*",)),
    ("qwen3_moe", "lora", ("self_attn.*", "*.switch_mlp.*")),
    ("mixtral", "lora", ("self_attn.*", "*.switch_mlp.*")),
]
HUB_IDS = [f"{name}-{kind}" for name, kind, _ in HUB_CASES]


@pytest.mark.parametrize(("name", "kind", "modules"), HUB_CASES, ids=HUB_IDS)
def test_peft(tmp_path, transformers, name, kind, modules):
    from peft import PeftModel

    base = save_hub(transformers, name, tmp_path / "hub")
    trained, expected = train(base, kind, modules=modules)
    export_peft(trained, base, tmp_path / "adapter")
    assert_gives(load(base, adapter=tmp_path / "adapter").stage, expected)
    twin = PeftModel.from_pretrained(torch_model(transformers, base), tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(twin), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("name", "kind", "modules"), HUB_CASES, ids=HUB_IDS)
def test_hub(tmp_path, transformers, name, kind, modules):
    """A merged model that transformers loads, from a base of either format."""
    base = save_hub(transformers, name, tmp_path / "hub")
    hub = open_checkpoint(base)
    if name in ("qwen3", "mixtral"):
        config = json.loads((base / "config.json").read_text())
        base = save_checkpoint(load_twin(base), config, tmp_path / "mlx")
    trained, expected = train(base, kind, modules=modules)
    export_merged(trained, base, tmp_path / "merged", format="hf", max_shard_bytes=30_000)
    merged = open_checkpoint(tmp_path / "merged")
    assert {n: i.shape for n, i in merged.tensors.items()} == {
        n: i.shape for n, i in hub.tensors.items()
    }
    twin = torch_model(transformers, tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(twin), expected, rtol=0, atol=5e-5)
    assert_gives(load(tmp_path / "merged").stage, expected)


def test_a_tied_head_that_the_file_has_as_well(tmp_path, transformers):
    """Which transformers would believe, if it were the old one."""
    base = save_hub(transformers, "llama", tmp_path / "hub", tie_word_embeddings=True)
    weights = mx.load(str(base / "model.safetensors"))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "pt"})
    trained, expected = train(base, modules=ENDS)
    export_merged(trained, base, tmp_path / "merged", format="hf")
    merged = open_checkpoint(tmp_path / "merged")
    head = merged.read("lm_head.weight")
    assert mx.array_equal(head, merged.read("model.embed_tokens.weight"))
    assert not mx.array_equal(head, weights["lm_head.weight"])
    twin = torch_model(transformers, tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(twin), expected, rtol=0, atol=5e-5)


def test_target_modules(tmp_path):
    """The ends of names where they name no other module."""
    base = plain(tmp_path, "llama")
    cases = {
        ("*.q_proj", "lm_head"): ["lm_head", "q_proj"],
        ("model.layers.[13].mlp.up_proj",): [f"model.layers.{i}.mlp.up_proj" for i in (1, 3)],
    }
    for number, (modules, wanted) in enumerate(cases.items()):
        out = tmp_path / str(number)
        export_peft(train(base, modules=modules)[0], base, out)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["target_modules"] == wanted
        assert (config["r"], config["lora_alpha"], config["use_dora"]) == (3, 7.5, False)


def test_gguf(tmp_path):
    """Names are Hugging Face's, the tokenizer comes from the file, packed weights are unpacked."""
    keys = {k: v for k, v in metadata().items() if k.startswith("tokenizer")}
    kinds = {"blk.0.attn_q.weight": Kind.Q8_0, "blk.0.ffn_up.weight": Kind.Q8_0}
    base = write_gguf(tmp_path / "m.gguf", kinds=kinds, keys=keys)
    path = "model.layers.0.self_attn.q_proj"
    down, up = mx.ones((3, 64)), mx.ones((64, 3))
    trained = Stub({f"{path}.lora_down": down, f"{path}.lora_up": up}, LORA)
    export_merged(trained, base, tmp_path / "merged", format="hf")
    merged, source = open_checkpoint(tmp_path / "merged"), open_checkpoint(base)
    for name in merged.tensors:
        wanted = values_of(source, name) + (7.5 if name == f"{path}.weight" else 0)
        found = merged.read(name).astype(mx.float32)
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-3, atol=1e-3, err_msg=name)
    assert len(merged.tensors) == 11 and verify(tmp_path / "merged")
    assert (tmp_path / "merged/tokenizer.json").exists()


# -- what is refused --

LORA = {"kind": "lora", "rank": 3, "scale": 2.5}
DORA = LORA | {"kind": "dora"}
FULL = {"kind": "full"}
Q_PROJ, SWITCH = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.switch_mlp.up_proj"


def factors(path: str = Q_PROJ, out: int = 32, rank: int = 3, **shape: Any) -> dict[str, mx.array]:
    experts = shape.get("experts", ())
    found = {
        f"{path}.lora_down": mx.ones((*experts, rank, shape.get("inputs", 32))),
        f"{path}.lora_up": mx.ones((*experts, out, rank)),
    }
    if shape.get("dora"):
        found[f"{path}.dora_magnitude"] = mx.ones((*experts, out))
    return found


EMBEDDING = factors("model.embed_tokens", 128)
EXPERTS_DORA = factors(SWITCH, 16, experts=(4,), dora=True)
NORM = {"model.norm.weight": mx.ones((32,))}
ALL = (export_mlx_adapter, export_peft, export_merged)
REFUSED = {
    "no such module": (ALL, "llama", factors("model.layers.9.x"), LORA, "no module model.layers.9"),
    "no projection": (ALL, "llama", factors("model.norm"), LORA, "model.norm is a RMSNorm"),
    "another shape": (ALL, "llama", factors(out=31), LORA, r"lora_up has shape \(31, 3\)"),
    "another rank": (ALL, "llama", factors(rank=4), LORA, r"lora_down has shape \(4, 32\)"),
    "half a pair": (ALL, "llama", {f"{Q_PROJ}.lora_up": mx.ones((32, 3))}, LORA, "not just the"),
    "no magnitude": (ALL, "llama", factors(), DORA, "not just the parameters of 'dora'"),
    "no such method": (ALL, "llama", factors(), {"kind": "ia3"}, "'ia3', not one of"),
    "no scale": (ALL, "llama", factors(), {"kind": "lora", "rank": 3}, "what rank and scale"),
    "nothing": (ALL, "llama", {}, LORA, "it has 0 factors of 0"),
    "no such parameter": (ALL, "llama", factors() | {"x.y": mx.ones(3)}, LORA, "no parameter x.y"),
    "full, shape": (ALL, "llama", {"model.norm.weight": mx.ones(31)}, FULL, r"has shape \(31,\)"),
    "mlx-lm: more": (ALL[:1], "llama", factors() | NORM, LORA, "nothing beside factors"),
    "mlx-lm: DoRA on experts": (ALL[:1], "qwen3_moe", EXPERTS_DORA, DORA, "mlx-lm says: .*DoRA"),
    "peft: DoRA on experts": (ALL[1:2], "qwen3_moe", EXPERTS_DORA, DORA, "no DoRA.*SwitchLinear"),
    "peft: full": (ALL[1:2], "llama", NORM, FULL, "adapters hold factors"),
    "peft: tied": (ALL[1:2], "tied", EMBEDDING, LORA, "is the output head as well"),
    "peft: wrapped": (ALL[1:2], "qwen2_vl", factors(f"language_model.{Q_PROJ}"), LORA,
                      "q_proj.weight has no name.*it may be model.layers.1.* elsewhere"),
    "peft: computed": (ALL[1:2], "gpt_oss", factors(), LORA, r"no name.* \(flatten\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    exports, name, parameters, method, message = REFUSED[case]
    base = plain(tmp_path, "llama" if name == "tied" else name, **(TIED if name == "tied" else {}))
    for export in exports:
        with pytest.raises((ConfigError, IntegrityError), match=message) as error:
            export(Stub(parameters, method), base, tmp_path / "out")
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_mlx_lm_gets_wrong_about_packed_bases(tmp_path):
    base = save_quantized(tmp_path / "model", "affine4")
    size = {"out": 128, "inputs": 64}
    cases = [
        (factors("model.embed_tokens", **size, dora=True), DORA, "no DoRA for a packed embedding"),
        ({"lm_head.weight": mx.ones((128, 64))}, FULL, "in place of a packed one"),
    ]
    for parameters, method, message in cases:
        with pytest.raises(ConfigError, match=message):
            export_mlx_adapter(Stub(parameters, method), base, tmp_path / "out")


def test_forms_that_do_not_exist(tmp_path):
    base, trained = plain(tmp_path, "llama"), Stub(factors(), LORA)
    for options, message in (
        ({"quantize": {"bits": 7}}, "7 bits in groups of 64"),
        ({"quantize": {"bits": 4}, "format": "hf"}, "no place in Hugging Face's format"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_merged(trained, base, tmp_path / "out", **options)
    config = json.loads((base / "config.json").read_text())
    hub = save_checkpoint(load_twin(base), config, tmp_path / "hub")
    weights = mx.load(str(hub / "model.safetensors"))
    mx.save_safetensors(str(hub / "model.safetensors"), weights, {"format": "pt"})
    config["quantization_config"] = {"quant_method": "fp8"}
    (hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized \(fp8\).*original model"):
        export_merged(trained, hub, tmp_path / "out", format="hf")


# -- the directory --


def test_the_directory_is_whole_or_not_there(tmp_path, monkeypatch):
    base, trained = plain(tmp_path, "llama"), Stub(factors(), LORA)
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    export_merged(trained, base, out)  # an empty directory is taken
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for export in ALL:
        with pytest.raises(OutputError, match="exists and is not empty"):
            export(trained, base, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode

    def fail(name: str) -> mx.array:
        raise StorageError(f"{name}: the disk is gone")

    monkeypatch.setattr(trained, "read", fail)
    for export in ALL:
        with pytest.raises(StorageError, match="the disk is gone"):
            export(trained, base, tmp_path / "new" / "other")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_weights_are_written_one_group_at_a_time(tmp_path):
    """In shards of a given size, wide elements first, whatever shapes there are."""
    dtypes = [mx.bfloat16, mx.float32, mx.bool_, mx.int64]
    arrays = {f"a{i}": mx.arange(i).astype(dtypes[i % 4]) for i in range(6)}
    arrays |= {"scalar": mx.array(2.0), "matrix": mx.ones((3, 5)).T}
    parts = [Part(name, array.shape, array.dtype) for name, array in arrays.items()]
    groups = [Group((part,), lambda n=part.name: {n: arrays[n]}) for part in parts]
    total = write_weights(tmp_path, groups, "pt", max_shard_bytes=64)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3 and total == sum(array.nbytes for array in arrays.values())
    found = {name: array for file in files for name, array in mx.load(str(file)).items()}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and mx.array_equal(found[name], array)
    tensors = [info for file in files for info in read_header(ByteFile(file))[0].values()]
    assert all(info.offset % info.dtype.size == 0 for info in tensors if info.nbytes)

    size = 1 << 20
    part = {name: Part(name, (size,), mx.float32) for name in map(str, range(16))}
    groups = [Group((p,), lambda n=n: {n: mx.full((size,), float(n))}) for n, p in part.items()]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write_weights(tmp_path, groups, "mlx")
    assert mx.get_peak_memory() - before < 4 * 4 * size


def test_a_damaged_base_is_not_merged(tmp_path):
    base = plain(tmp_path, "llama")
    write_checksums(base)
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="SHA-256"):
        export_merged(Stub(factors(), LORA), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the job --


def test_the_job(tmp_path, monkeypatch, capsys):
    base, run_dir = save_model(tmp_path / "base"), tmp_path / "run"
    run_dir.mkdir()
    files = fingerprint(open_checkpoint(base))
    state = {"method": LORA, "model": {"path": str(base), "files": files}}
    store = CheckpointStore(run_dir / "checkpoints", Communicator(), keep_last=3)
    for step, metric in ((10, 1.0), (20, 2.0)):
        arrays = {f"param/{n}": a * step for n, a in factors().items()}
        pieces = {name: Piece(array, array.shape) for name, array in arrays.items()}
        store.save(step, pieces, state, metric)
    store.poll(wait=True)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(JOB), str(run_dir), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(JOB), run_name="__main__")
        return caught.value.code

    for number, (step, wanted) in enumerate({"best": 10, "latest": 20, "10": 10}.items()):
        out = tmp_path / str(number)
        assert run("--step", step, "--to", "mlx-adapter", str(out)) == 0
        assert f"{out} written" in capsys.readouterr().out
        found = mx.load(str(out / "adapters.safetensors"))
        assert mx.all(found[f"{Q_PROJ}.lora_a"] == wanted)
    assert run("--to", "mlx", "--quantize", "8", "--group-size", "32", str(tmp_path / "m")) == 0
    assert "packing has changed the weights by" in capsys.readouterr().out
    model, tokenizer = mlx_lm.load(str(tmp_path / "m"))
    assert model.model.layers[0].self_attn.q_proj.bits == 8 and tokenizer.encode("a")
    adapted, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "1"))
    assert adapted.model.layers[1].self_attn.q_proj.scale == 2.5
    assert run("--to", "peft", str(tmp_path / "m")) == 73
    assert capsys.readouterr().err.startswith("export: ")
    assert run("--to", "peft", "--step", "15", str(tmp_path / "x")) == 78
    assert "has no checkpoint 15" in capsys.readouterr().err
    assert run("--to", "peft", "--quantize", "4", str(tmp_path / "x")) == 2
    lock = lock_run_dir(run_dir)  # the run goes on
    assert run("--to", "peft", str(tmp_path / "x")) == 73
    os.close(lock)
    assert run("--to", "peft", "--base", str(tmp_path / "none"), str(tmp_path / "x")) == 78
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert run("--to", "peft", str(tmp_path / "x")) == 78
    assert "config.json is not what it was when the run began" in capsys.readouterr().err
    assert run("--to", "peft", "--base", str(base), str(tmp_path / "x")) == 0
