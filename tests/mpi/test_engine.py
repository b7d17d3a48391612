"""What the engine's ranks decide together: memory, slots, who gets which rows."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from hpcmlx import comm
from hpcmlx.comm import Communicator
from hpcmlx.inference import engine as engine_module
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.kv import Load, measure_cost
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from tests import layouts
from tests.mpi.test_parity import checkpoint, load
from tests.twin import LOGPROB_TOLERANCE, NumberTokenizer

pytestmark = pytest.mark.mpi

SYSTEM = [(7 * i) % 90 for i in range(20)]


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    """Rows that share a beginning, rows that share nothing, three samples of one prompt."""
    rng = np.random.default_rng(0)
    prompts = [[*SYSTEM, *rng.integers(0, 90, n).tolist()] for n in (1, 5, 5, 9, 3, 2)]
    prompts += [rng.integers(0, 90, n).tolist() for n in (1, 30, 4, 4)]
    greedy = SamplingParams(max_tokens=6, logprobs=3)
    made = [Request(i, str(i), p, greedy) for i, p in enumerate(prompts)]
    for sample in range(3):
        params = SamplingParams(max_tokens=5, temperature=1.0, seed=sample, presence_penalty=0.5)
        made.append(Request(len(prompts), "many", SYSTEM, params, sample))
    return made


def gathered(world, rows, mesh):
    """{(index, sample): row} of every replica, from the ranks that record; on all ranks."""
    mine = rows if mesh.is_last_stage and mesh.tp == 0 else []
    everything = sum(world.allgather(mine), [])
    assert len(everything) == len({row.key for row in everything})
    return {row.key: row for row in everything}


def run(world, path, layout, requests, on_visit=lambda: None, **options):
    mesh = Mesh(layout.dims, world)
    engine = Engine(load(path, mesh, layout), mesh, NumberTokenizer(), **options)
    rows = []
    engine.run(requests, rows.append, on_visit)
    return gathered(world, rows, mesh), engine


@pytest.fixture(scope="session")
def alone(world, shared, on_root, requests):
    """What one rank gives, one row at a time and without any sharing."""
    path = checkpoint("llama", shared, on_root)

    def compute():
        one = Communicator()
        options = {"batch_size": 1, "prefix_cache": False}
        return run(one, path, layouts.Layout(), requests, **options)[0]

    return path, on_root(compute)


def assert_same(rows, alone, label=""):
    assert rows.keys() == alone.keys()
    for key, row in rows.items():
        assert row.tokens == alone[key].tokens, f"{label} row {key}"
        for mine, true in zip(row.logprobs or (), alone[key].logprobs or (), strict=True):
            assert abs(mine.logprob - true.logprob) < LOGPROB_TOLERANCE
            assert [token for token, _ in mine.top] == [token for token, _ in true.top]


@pytest.mark.parametrize("layout", layouts.cases(layouts.TINY, comm.init().size), ids=str)
def test_shared_prefixes_samples_and_logprobs(layout, world, alone, requests):
    path, expected = alone
    rows, engine = run(world, path, layout, requests, batch_size=3, prefill_chunk=8)
    assert_same(rows, expected, str(layout))
    assert any(row.num_cached_tokens >= len(SYSTEM) - 1 for row in rows.values())
    assert engine.stats.cached_tokens > 0 or layout.dims.dp > 1


def test_the_rank_with_least_memory_decides(world, alone, requests):
    """Each rank has another budget; a decision of its own would leave the others waiting."""
    path, expected = alone
    for layout in layouts.TINY[world.size]:
        mesh = Mesh(layout.dims, world)
        loaded = load(path, mesh, layout)
        one = measure_cost(loaded.stage, 8)
        row = one(Load(1, 30, prefill=True)) + one(Load(1, 37))
        limit = int(row * (1.2 + 2 * world.rank))
        engine = Engine(
            loaded, mesh, NumberTokenizer(), batch_size=4, prefill_chunk=8, kv_memory=limit
        )
        assert not any(engine.why_too_large(request) for request in requests)
        seen, rows = [0], []
        engine.run(requests, rows.append, lambda e=engine, s=seen: s.append(e.kv_bytes))
        assert max(seen) <= limit
        assert_same(gathered(world, rows, mesh), expected, str(layout))


@pytest.mark.parametrize(("too_idle", "more"), [(0.0, 1), (2.0, 0)])
def test_a_slot_more_where_stages_wait(too_idle, more, world, alone, requests, monkeypatch):
    path, expected = alone
    if world.size == 1:
        return
    monkeypatch.setattr(engine_module, "_TOO_IDLE", too_idle)
    monkeypatch.setattr(engine_module, "_ROUNDS", 2)
    layout = layouts.Layout(pp=world.size)
    rows, engine = run(world, path, layout, requests, batch_size=2)
    assert len(engine.slots) == world.size + more
    assert_same(rows, expected)
    _, engine = run(world, path, layout, requests, num_microbatches=1)
    assert len(engine.slots) == 1  # what was asked for


def test_a_slow_replica_takes_fewer_rows(world, alone, requests):
    path, _ = alone
    if world.size == 1:
        return
    many = [replace(requests[0], index=i, id=str(i)) for i in range(60)]
    mesh = Mesh(ParallelDims(dp=world.size), world)
    engine = Engine(load_model(open_checkpoint(path), mesh), mesh, NumberTokenizer(), batch_size=2)
    slow = world.rank == world.size - 1
    rows = []
    engine.run(many, rows.append, lambda: time.sleep(0.05 if slow else 0.002))
    counts = world.allgather(len(rows))
    assert sum(counts) == 60
    assert counts[-1] < min(counts[:-1])


def test_a_long_prompt_does_not_hold_the_others_up(world, alone, requests):
    """While it flows down the stages in chunks, the other rows go on decoding."""
    path, expected = alone
    for layout in layouts.TINY[world.size]:
        if layout.dp > 1:
            continue
        mesh = Mesh(layout.dims, world)
        engine = Engine(
            load(path, mesh, layout), mesh, NumberTokenizer(), batch_size=4, prefill_chunk=2,
            num_microbatches=1, prefix_cache=False,
        )  # fmt: skip
        steps_beside = 0

        def look(engine=engine):
            nonlocal steps_beside
            (slot,) = engine.slots
            steps_beside += bool(slot.joining) and bool(slot.live)

        rows = []
        engine.run(requests, rows.append, look)
        assert steps_beside >= 5
        assert_same(gathered(world, rows, mesh), expected, str(layout))
