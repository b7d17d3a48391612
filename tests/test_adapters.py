"""Adapters: what is loaded gives the logits of mlx-lm's load_adapters and of PEFT on torch, and what
has no exact place is refused by name. tests/mpi/test_adapters.py does the same on every layout.
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
from hpcmlx.models.adapter_files import open_adapter
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from tests.tiny_configs import CONFIGS, build
from tests.twin import load_twin, save_checkpoint

ALONE = Mesh(ParallelDims(), Communicator())
TOKENS = mx.array([[5, 9, 77, 3, 3, 40, 1]])
LINEARS = (nn.Linear, nn.QuantizedLinear)
SWITCHES = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def layer_keys(model: nn.Module, kinds: tuple) -> list[str]:
    """Paths, within a layer, of the modules that can be adapted."""
    return sorted({p for layer in model.layers for p, m in layer.named_modules() if isinstance(m, kinds)})


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
        parameters = dict(tree_flatten(model.parameters()))
        weights = {
            name: value + 0.3 * noise(value.shape, i) / value.shape[-1] ** 0.5
            for i, (name, value) in enumerate(parameters.items())
            if "layers.1." in name or name.endswith("norm.weight")
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
