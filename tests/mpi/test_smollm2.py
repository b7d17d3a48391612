"""SmolLM2-135M-Instruct, real weights: every layout equals mlx-lm's single process.

The twin is mlx-lm on a float32 conversion; hpcmlx reads the packed 4-bit checkpoint and
dequantizes each rank's part of it while loading, so this compares the whole way from file to token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcmlx import comm
from hpcmlx.inference.evaluate import score_tokens
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.convert import convert
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import encode, load_tokenizer, render_chat
from tests import layouts
from tests.mpi.test_parity import run_engine
from tests.twin import (
    LOGPROB_TOLERANCE,
    assert_same_greedy,
    load_twin,
    twin_greedy,
    twin_logprobs,
)

pytestmark = pytest.mark.mpi

MODEL = Path(__file__).resolve().parents[2] / "models" / "smollm2"
NUM_LAYERS = 30
WINDOW = 48
NUM_NEW = 16
TEXT = (
    "The tide tables for the harbour were printed every spring by the same small press. They "
    "listed, for each of the 365 days, two high waters and two low ones, to the minute. Nobody "
    "remembered who had first worked them out; the numbers were simply there, like the stones of "
    "the quay, and every captain who had ever trusted them had come home."
)
QUESTIONS = ["What is the capital of France?", "Write one line of Python that sorts a list."]


@pytest.fixture(scope="module")
def truth(world, shared, on_root):
    """What mlx-lm says, computed once on rank 0: (tokens, logprobs, prompts, greedy rows)."""
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing: run `make models/smollm2/config.json`")

    def compute():
        tokenizer = load_tokenizer(MODEL)
        tokens = encode(tokenizer, TEXT)
        prompts = [render_chat(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]
        target = shared / "smollm2-float32"
        convert(MODEL, target, dequantize="float32")
        twin = load_twin(target)
        greedy = [twin_greedy(twin, prompt, NUM_NEW) for prompt in prompts]
        return tokens, twin_logprobs(twin, tokens, WINDOW), prompts, greedy

    return on_root(compute)


@pytest.mark.parametrize("layout", layouts.cases(layouts.SMOLLM2, comm.init().size), ids=str)
def test_layout(layout, world, truth):
    tokens, expected, prompts, greedy = truth
    mesh = Mesh(layout.dims, world)
    loaded = load_model(
        open_checkpoint(MODEL),
        mesh,
        weights="dequantize",
        tp_shares=layout.tp_shares,
        pp_layers=layout.layers(NUM_LAYERS),
    )
    scores = score_tokens(loaded, mesh, tokens, WINDOW)
    rows = run_engine(loaded, mesh, prompts, lambda i: SamplingParams(max_tokens=NUM_NEW))
    if world.rank == 0:
        worst = np.nanmax(np.abs(scores.logprobs - expected))
        assert worst <= LOGPROB_TOLERANCE, f"{layout}: max |Δlogprob| = {worst:.1e}"
        assert np.array_equal(np.isnan(scores.logprobs), np.isnan(expected))
        for row, (twin, gaps) in zip(rows, greedy, strict=True):
            assert_same_greedy(row, twin, gaps, str(layout))
    world.barrier()
