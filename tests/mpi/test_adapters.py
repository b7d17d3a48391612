"""Adapters on every layout equal mlx-lm's load_adapters in a single process."""

from __future__ import annotations

import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters

from hpcmlx import comm
from hpcmlx.inference.evaluate import score_tokens
from hpcmlx.mesh import Mesh
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from tests import layouts
from tests.mpi.test_parity import checkpoint, num_layers
from tests.test_adapters import save_mlx_adapter, save_peft_adapter, to_peft
from tests.test_loader import save_quantized
from tests.twin import LOGPROB_TOLERANCE, load_twin, twin_logprobs

pytestmark = pytest.mark.mpi

WINDOW = 9
TEXT = [int(t) for t in np.random.default_rng(0).integers(0, 90, 40)]
CASES = [
    ("llama", "lora"),
    ("llama", "dora"),
    ("llama", "full"),
    ("qwen2", "dora"),
    ("qwen3", "lora"),
    ("gemma3_text", "lora"),
    ("gemma3_text", "dora"),
    ("phi3", "lora"),
    ("qwen3_moe", "lora"),
    ("mixtral", "dora"),
    ("gpt_oss", "lora"),
    ("qwen3_moe", "peft"),
    ("packed", "lora"),
    ("packed", "dora"),
]


@pytest.fixture(scope="session")
def truth(shared, on_root):
    """(model directory, adapter directory, mlx-lm's log-probabilities), made once a session."""
    known = {}

    def compute(model, adapter, name, kind):
        if name == "packed" and not model.exists():
            save_quantized(model, "affine4")
        twin = load_twin(model)
        if kind == "peft":
            mlx = save_mlx_adapter(adapter.with_name(f"{adapter.name}-mlx"), twin)
            save_peft_adapter(adapter, to_peft(mlx, name))
        else:
            # mlx-lm's own DoRA takes the norm of a packed embedding's integers.
            mlx = save_mlx_adapter(adapter, twin, kind, ends=(name, kind) != ("packed", "dora"))
        return twin_logprobs(load_adapters(load_twin(model), str(mlx)).eval(), TEXT, WINDOW)

    def find(name, kind):
        if (name, kind) not in known:
            packed = name == "packed"
            model = shared / name if packed else checkpoint(name, shared, on_root)
            adapter = shared / f"{name}-{kind}"
            expected = on_root(lambda: compute(model, adapter, name, kind))
            known[name, kind] = model, adapter, expected
        return known[name, kind]

    return find


@pytest.mark.parametrize("layout", layouts.cases(layouts.TINY, comm.init().size), ids=str)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_layout(name, kind, layout, world, truth):
    path, adapter, expected = truth(name, kind)
    mesh = Mesh(layout.dims, world)
    loaded = load_model(
        open_checkpoint(path),
        mesh,
        tp_shares=layout.tp_shares,
        pp_layers=layout.layers(3 if name == "packed" else num_layers(name)),
        weights="keep",
        adapter=adapter,
    )
    assert loaded.bytes_read <= 1.1 * loaded.num_bytes  # only its part of the adapter as well
    scores = score_tokens(loaded, mesh, TEXT, WINDOW, batch_size=2)
    if world.rank == 0:
        np.testing.assert_allclose(scores.logprobs, expected, rtol=0, atol=LOGPROB_TOLERANCE)
    world.barrier()
