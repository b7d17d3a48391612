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
from tests.mpi.test_parity import checkpoint, num_layers, text  # noqa: F401
from tests.test_adapters import save_mlx_adapter
from tests.twin import LOGPROB_TOLERANCE, load_twin, twin_logprobs

pytestmark = pytest.mark.mpi

WINDOW = 9
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
]


@pytest.fixture(scope="session")
def truth(shared, on_root, text):  # noqa: F811
    """(model directory, adapter directory, mlx-lm's log-probabilities), made once a session."""
    known = {}

    def find(name, kind):
        model = checkpoint(name, shared, on_root)
        adapter = shared / f"{name}-{kind}"

        def compute():
            save_mlx_adapter(adapter, load_twin(model), kind)
            twin = load_adapters(load_twin(model), str(adapter)).eval()
            return twin_logprobs(twin, text, WINDOW)

        if (name, kind) not in known:
            known[name, kind] = model, adapter, on_root(compute)
        return known[name, kind]

    return find


@pytest.mark.parametrize("layout", layouts.cases(layouts.TINY, comm.init().size), ids=str)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_layout(name, kind, layout, world, truth, text):  # noqa: F811
    path, adapter, expected = truth(name, kind)
    mesh = Mesh(layout.dims, world)
    loaded = load_model(
        open_checkpoint(path),
        mesh,
        tp_shares=layout.tp_shares,
        pp_layers=layout.layers(num_layers(name)),
        adapter=adapter,
    )
    assert loaded.bytes_read <= 1.1 * loaded.num_bytes  # only its part of the adapter as well
    scores = score_tokens(loaded, mesh, text, WINDOW, batch_size=2)
    if world.rank == 0:
        np.testing.assert_allclose(scores.logprobs, expected, rtol=0, atol=LOGPROB_TOLERANCE)
    world.barrier()
