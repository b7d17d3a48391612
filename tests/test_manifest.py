"""A run goes on only with what it was begun with, and says what is different."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hpcmlx.config import GenerateConfig, compose
from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.inference import manifest as module
from hpcmlx.inference.manifest import Manifest, check
from hpcmlx.job import CONF
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.rundir import MANIFEST
from tests.fixtures import model  # noqa: F401 - a fixture
from tests.test_gguf import llama_tensors, write

SHA = "12345678" * 8


@pytest.fixture
def place(tmp_path, model):  # noqa: F811
    """A model of one's own and a run directory."""
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "run").mkdir()
    return tmp_path


def manifest_of(place: Path, *overrides: str, sha256: str = SHA, **resolved: str) -> Manifest:
    base = [f"input={place}/prompts.jsonl", f"model.path={place}/model"]
    config = compose(GenerateConfig, CONF, "generate", [*base, *overrides])
    resolved = {"dtype": "float32", "weights": "dequantize", **resolved}
    checkpoint = open_checkpoint(config.model.path)
    return Manifest.build(config, checkpoint, input_sha256=sha256, **resolved)


def begun(place: Path, *overrides: str) -> Path:
    manifest_of(place, *overrides).write(place / "run")
    return place / "run"


def refusal(run_dir: Path, manifest: Manifest) -> str:
    with pytest.raises(ConfigError) as caught:
        check(run_dir, manifest)
    assert caught.value.exit_code == 78 and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_run_goes_on(place):
    run_dir = begun(place)
    assert check(run_dir, manifest_of(place)) == []
    assert (run_dir / MANIFEST).stat().st_mode & 0o777 == 0o600
    stored = json.loads((run_dir / MANIFEST).read_text())
    assert stored["settings"]["sampling.temperature"] == 0.0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= stored["model"]["files"].keys()


def test_what_does_not_decide_the_rows_may_change(place):
    run_dir = begun(place)
    more = ["parallel.pp=2", "inference.batch_size=3", "inference.kv_memory=1GiB"]
    more += ["inference.prefix_cache=false", f"run_dir={place}/other", "launch=mpirun"]
    assert check(run_dir, manifest_of(place, *more)) == []
    # The model and the input may have moved.
    shutil.copytree(place / "model", place / "copy")
    for name in ("README.md", ".hidden", "checksums.json"):
        (place / "copy" / name).write_text("new")
    moved = manifest_of(place, f"model.path={place}/copy", "input=elsewhere.jsonl")
    assert check(run_dir, moved) == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.temperature=0.7", "sampling.temperature was 0.0, is 0.7"),
        ("sampling.n=2", "sampling.n was 1, is 2"),
        ("sampling.stop=[a,'ü']", 'sampling.stop was [], is ["a", "ü"]'),
        ("sampling.logprobs=3", "sampling.logprobs was null, is 3"),
        ("inference.kv_bits=8", "inference.kv_bits was null, is 8"),
        ("data.prompt_column=text", 'data.prompt_column was "prompt", is "text"'),
    ],
)
def test_a_setting_that_has_changed(place, override, words):
    run_dir = begun(place)
    message = refusal(run_dir, manifest_of(place, override))
    assert f"run directory {run_dir} was begun differently: {words} (set it back" in message


def test_types_as_they_are_resolved(place):
    message = refusal(begun(place), manifest_of(place, dtype="bfloat16", weights="keep"))
    assert 'model.dtype was "float32", is "bfloat16"' in message
    assert 'model.weights was "dequantize", is "keep"' in message


@pytest.mark.fault
def test_an_input_that_has_changed(place):
    message = refusal(begun(place), manifest_of(place, sha256="abcdef01" * 8))
    assert f"input {place}/prompts.jsonl has changed (sha256 12345678… → abcdef01…)" in message


@pytest.mark.fault
def test_model_files_that_have_changed(place):
    run_dir = begun(place)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        path = place / "model" / name
        data = path.read_bytes()
        if name == "model.safetensors":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            path.write_bytes(data + b"\n")
        message = refusal(run_dir, manifest_of(place))
        assert f"model {place}/model: file {name} has changed (" in message
        path.write_bytes(data)
    (place / "model/extra.json").write_text("{}")
    assert "file extra.json is new" in refusal(run_dir, manifest_of(place))
    (place / "model/extra.json").unlink()
    (place / "model/tokenizer_config.json").unlink()
    assert "file tokenizer_config.json is gone" in refusal(run_dir, manifest_of(place))


def test_an_adapter(place):
    adapter = place / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"a": np.zeros(3, np.float32)}, adapter / "adapters.safetensors")
    run_dir = begun(place)
    with_it = manifest_of(place, f"model.adapter={adapter}")
    assert f'model.adapter was null, is "{adapter}"' in refusal(run_dir, with_it)
    with_it.write(run_dir)
    assert check(run_dir, with_it) == []
    assert f'model.adapter was "{adapter}", is null' in refusal(run_dir, manifest_of(place))
    save_file({"a": np.ones(3, np.float32)}, adapter / "adapters.safetensors")
    message = refusal(run_dir, manifest_of(place, f"model.adapter={adapter}"))
    assert f"adapter {adapter}: file adapters.safetensors has changed" in message


def test_other_versions_are_a_warning(place):
    run_dir = begun(place)
    now = manifest_of(place)
    newer = replace(now, versions=now.versions | {"mlx-lm": "99.0"})
    [warning] = check(run_dir, newer)
    assert warning == f"mlx-lm was {now.versions['mlx-lm']} when this run was begun, is 99.0"


def test_every_difference_is_listed_up_to_a_limit(place):
    run_dir = begun(place)
    keys = ("top_p=0.5", "top_k=2", "min_p=0.1", "seed=1", "max_tokens=3", "n=2", "logprobs=1")
    changed = [f"sampling.{key}" for key in (*keys, "temperature=1", "presence_penalty=1")]
    message = refusal(run_dir, manifest_of(place, *changed))
    assert message.count(" was ") == 8 + 1 and "; and 1 more" in message


def test_no_secret_from_the_environment_is_kept(place, monkeypatch):
    monkeypatch.setenv("TOKEN", "hunter2")
    override = "data.id_column='${oc.env:TOKEN}'"
    run_dir = begun(place, override)
    assert "hunter2" not in (run_dir / MANIFEST).read_text()
    assert check(run_dir, manifest_of(place, override)) == []
    monkeypatch.setenv("TOKEN", "hunter3")
    message = refusal(run_dir, manifest_of(place, override))
    assert "data.id_column was" in message and "hunter" not in message


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"input": 1}', "\xff", '{"settings": {'])
def test_a_manifest_that_is_none(place, text):
    (place / "run" / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json: not a manifest"):
        check(place / "run", manifest_of(place))


# -- big files --


def test_a_big_file_is_sampled_and_a_new_training_step_is_seen(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = np.random.default_rng(0).standard_normal(4 << 20).astype(np.float32)
    save_file({"w": weights}, path)
    header = path.stat().st_size - weights.nbytes
    before = module._sampled_sha256(path, header)
    assert module._sampled_sha256(path, header) == before
    data = bytearray(path.read_bytes())
    for at in (10, header, len(data) - 1):  # header, first and last byte of the weights
        data[at] ^= 1
        path.write_bytes(data)
        assert module._sampled_sha256(path, header) != before
        data[at] ^= 1
    path.write_bytes(data + b"\0")
    assert module._sampled_sha256(path, header) != before
    save_file({"w": weights * np.float32(1.001)}, path)
    assert module._sampled_sha256(path, header) != before


def test_the_size_of_a_file_does_not_matter_to_the_time(tmp_path):
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(200 << 30)
    begin = time.perf_counter()
    module._sampled_sha256(path, 100_000)
    assert time.perf_counter() - begin < 10


def test_a_gguf_file(place):
    tensors = llama_tensors()
    write(place / "m.gguf", tensors=tensors)
    run_dir = begun(place, f"model.path={place}/m.gguf")
    assert list(json.loads((run_dir / MANIFEST).read_text())["model"]["files"]) == ["m.gguf"]
    assert check(run_dir, manifest_of(place, f"model.path={place}/m.gguf")) == []
    tensors["output_norm.weight"] = tensors["output_norm.weight"] + 1
    write(place / "m.gguf", tensors=tensors)
    message = refusal(run_dir, manifest_of(place, f"model.path={place}/m.gguf"))
    assert "file m.gguf has changed" in message
