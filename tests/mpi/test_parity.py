"""Every plan on every layout equals mlx-lm's single-process model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx import comm
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.evaluate import score_tokens
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from tests import layouts
from tests.tiny_configs import CONFIGS, build
from tests.twin import (
    LOGPROB_TOLERANCE,
    NumberTokenizer,
    assert_same_greedy,
    load_twin,
    save_checkpoint,
    twin_greedy,
    twin_logprobs,
)

pytestmark = pytest.mark.mpi

PLANNED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "deepseek_v3",
    "kimi_k2",
    "kimi_k25",
    "gpt_oss",
]
WINDOW = 9
PROMPTS = [[5, 3, 8], [1], [9, 9, 2, 4, 7, 6, 3], [11, 12], [30, 31, 32, 33, 34]]
NUM_NEW = 6


ALIASES = {"mistral": "llama", "kimi_k2": "deepseek_v3"}  # model types of the same architecture


def checkpoint(name, shared, on_root):
    """A directory of random weights, made once a session."""
    path = shared / name

    def make():
        if not path.exists():
            base = ALIASES.get(name, name)
            save_checkpoint(build(base), CONFIGS[base] | {"model_type": name}, path)

    on_root(make)
    return path


def num_layers(name):
    config = CONFIGS[ALIASES.get(name, name)]
    return config.get("text_config", config)["num_hidden_layers"]


def load(path, mesh, layout):
    """This rank's part of the checkpoint that `checkpoint` made, cut as the layout says."""
    layers = layout.layers(num_layers(path.name))
    return load_model(open_checkpoint(path), mesh, tp_shares=layout.tp_shares, pp_layers=layers)


@pytest.fixture(scope="session")
def text():
    return [int(t) for t in np.random.default_rng(0).integers(0, 90, 40)]


def run_engine(loaded, mesh, prompts, sampling, **options):
    """Token lists of all prompts, on world rank 0."""
    requests = [Request(i, str(i), tuple(p), sampling(i)) for i, p in enumerate(prompts)]
    rows = []
    engine = Engine(loaded, mesh, NumberTokenizer(), **options)
    engine.run(requests, rows.append)
    mine = rows if mesh.pp == 0 and mesh.tp == 0 else []
    gathered = mesh.world.gather(mine)
    return gathered and [
        list(row.tokens) for row in sorted(sum(gathered, []), key=lambda row: row.index)
    ]


@pytest.mark.parametrize("layout", layouts.cases(layouts.TINY, comm.init().size), ids=str)
@pytest.mark.parametrize("name", PLANNED)
def test_plan(name, layout, world, shared, on_root, text):
    path = checkpoint(name, shared, on_root)
    mesh = Mesh(layout.dims, world)
    loaded = load(path, mesh, layout)
    scores = score_tokens(loaded, mesh, text, WINDOW, batch_size=2)
    rows = run_engine(loaded, mesh, PROMPTS, lambda i: SamplingParams(max_tokens=NUM_NEW))
    if world.rank == 0:
        twin = load_twin(path)
        expected = twin_logprobs(twin, text, WINDOW)
        np.testing.assert_allclose(scores.logprobs, expected, rtol=0, atol=LOGPROB_TOLERANCE)
        for prompt, row in zip(PROMPTS, rows, strict=True):
            tokens, gaps = twin_greedy(twin, prompt, NUM_NEW)
            assert_same_greedy(row, tokens, gaps, f"{name} {layout}")
    world.barrier()


def test_sampling_does_not_depend_on_the_layout(world, shared, on_root):
    """Every way to truncate, sampled on all layouts of this size and on one rank alone."""
    path = checkpoint("llama", shared, on_root)
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "top_p": 0.95, "top_k": 20, "min_p": 0.01},
        {},
    ]

    def sampling(i):
        return SamplingParams(max_tokens=NUM_NEW, seed=100 + i, **kinds[i % len(kinds)])

    prompts = PROMPTS + [[7, 7, 7, i] for i in range(7)]
    alone = None
    if world.rank == 0:
        mesh = Mesh(layouts.Layout().dims, comm.Communicator())
        alone = run_engine(
            load_model(open_checkpoint(path), mesh), mesh, prompts, sampling, batch_size=1
        )
        assert len({tuple(row) for row in alone}) == len(prompts)  # draws differ by seed
    for layout in layouts.TINY[world.size]:
        mesh = Mesh(layout.dims, world)
        loaded = load(path, mesh, layout)
        rows = run_engine(loaded, mesh, prompts, sampling, batch_size=3)
        if world.rank == 0:
            assert rows == alone, str(layout)
    world.barrier()


def test_bfloat16_crosses_stages_unchanged(world, shared, on_root, text):
    """Stages do the very operations of one process, so bfloat16 must come out bit for bit."""
    path = checkpoint("gemma3_text", shared, on_root)
    alone = None
    if world.rank == 0:
        mesh = Mesh(layouts.Layout().dims, comm.Communicator())
        loaded = load_model(open_checkpoint(path), mesh, dtype="bfloat16")
        alone = score_tokens(loaded, mesh, text, WINDOW).logprobs
    for layout in (layout for layout in layouts.TINY[world.size] if layout.tp == 1):
        mesh = Mesh(layout.dims, world)
        layers = layout.layers(num_layers("gemma3_text"))
        loaded = load_model(open_checkpoint(path), mesh, dtype="bfloat16", pp_layers=layers)
        assert all(leaf.dtype == mx.bfloat16 for leaf in loaded.stage.receives)
        scores = score_tokens(loaded, mesh, text, WINDOW)
        if world.rank == 0:
            np.testing.assert_array_equal(scores.logprobs, alone)
    world.barrier()


def test_only_the_shard_is_read(world, shared, on_root):
    """A rank reads its own bytes and holds no more than they need."""
    path = checkpoint("llama", shared, on_root)
    for layout in layouts.TINY[world.size]:
        mesh = Mesh(layout.dims, world)
        loaded = load(path, mesh, layout)
        assert loaded.bytes_read <= 1.1 * loaded.num_bytes
        total = sum(world.allgather(loaded.num_bytes)) / layout.dp
        size = (path / "model.safetensors").stat().st_size
        whole = size if layout.tp == layout.pp == 1 else size * 1.6  # tied ends, replicated norms
        assert total <= whole
