"""Random models for measurements that need a shape which no model at hand has.

Float32, as large as SmolLM2 (135M parameters) unless said otherwise.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2

from hpcmlx.comm import Communicator

_COMMON: dict[str, Any] = {
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
#: By name: SmolLM2's shape as qwen2; heads that divide by two; layers as wide as a 1B model's.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "heads8": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "wide": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
# The same shapes small, so that a test sees every step.
CONFIGS |= {
    f"tiny {name}": CONFIGS[name]
    | {"hidden_size": 8 * heads, "intermediate_size": 48, "num_hidden_layers": 4}
    | {"vocab_size": 128}
    for name, heads in (("qwen2", 9), ("heads8", 8))
}


def save_random(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint directory of a model with mlx-lm's own initial weights, the same every time."""
    module = {"llama": llama, "qwen2": qwen2}[config["model_type"]]
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def random_checkpoint(name: str, world: Communicator) -> Iterator[str]:
    """The directory of a random model, for as long as all ranks need it. Collective."""
    folder = world.bcast(tempfile.mkdtemp(prefix="hpcmlx-bench-") if world.rank == 0 else None)
    try:
        if world.rank == 0:
            save_random(Path(folder), _COMMON | CONFIGS[name])
        world.barrier()
        yield folder
    finally:
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(folder)
