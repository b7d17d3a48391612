"""A batch of mixed rows on one rank: hpcmlx against mlx-lm, and where the difference comes from.

Both have weights of their own in one process and run in turn. `hpcmlx.bench` runs these.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_model as mlx_lm_load

from hpcmlx.bench.rows import (
    Run,
    Variant,
    Workload,
    by_copying,
    in_input_order,
    report,
    run_hpcmlx,
    run_mlx_lm,
    runs_in_turn,
)
from hpcmlx.comm import Communicator
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer

BATCH = 32
_WARM_UP = Workload(num_rows=4, num_words=(3, 9), num_new=(2, 2))


class Sides:
    """The same model and rows on both sides."""

    def __init__(self, model: str, workload: Workload):
        self.tokenizer = load_tokenizer(model)
        self.requests = workload.requests(self.tokenizer)
        self.mesh = Mesh(ParallelDims(), Communicator())
        self.loaded = load_model(open_checkpoint(model), self.mesh)
        self.theirs = mlx_lm_load(Path(model))[0]
        warm_up = _WARM_UP.requests(self.tokenizer)
        run_hpcmlx(self.loaded, self.mesh, self.tokenizer, warm_up)
        run_mlx_lm(self.theirs, self.tokenizer, warm_up)

    def hpcmlx(self, **options: Any) -> Run:
        options = {"batch_size": BATCH} | options
        return run_hpcmlx(self.loaded, self.mesh, self.tokenizer, self.requests, **options)

    def mlx_lm(self, longest_first: bool = False, **options: Any) -> Run:
        requests = self.requests
        if longest_first:
            requests = sorted(requests, key=lambda request: -len(request.tokens))
        return run_mlx_lm(self.theirs, self.tokenizer, requests, batch_size=BATCH, **options)


def batch(model: str, rounds: int, workload: Workload) -> dict[str, Any]:
    """hpcmlx and mlx-lm's `BatchGenerator`, both with what they do by default."""
    sides = Sides(model, workload)
    variants = {"hpcmlx": Variant(sides.hpcmlx), "mlx-lm": Variant(sides.mlx_lm)}
    return report(runs_in_turn(rounds, variants), "mlx-lm")


def why(model: str, rounds: int, workload: Workload) -> dict[str, Any]:
    """One thing after the other taken from hpcmlx, then the same things given to mlx-lm."""
    sides = Sides(model, workload)
    bare = partial(sides.hpcmlx, prefix_cache=False)
    variants = {
        "hpcmlx": Variant(sides.hpcmlx),
        "… places by copying": Variant(sides.hpcmlx, by_copying),
        "… no shared prefix": Variant(bare),
        "… no shared prefix, in input order": Variant(bare, in_input_order),
        "mlx-lm": Variant(sides.mlx_lm),
        "… one row a prefill": Variant(partial(sides.mlx_lm, prefill_batch_size=1)),
        "… longest prompts first": Variant(partial(sides.mlx_lm, longest_first=True)),
        "… handed the shared prefix": Variant(partial(sides.mlx_lm, share_prefix=True)),
    }
    return report(runs_in_turn(rounds, variants), "mlx-lm")


def host(model: str, rounds: int, workload: Workload) -> dict[str, Any]:
    """The scheduler's own time, for few and for many rows a step."""
    sides = Sides(model, workload)
    variants = {
        f"{size} rows a step": Variant(partial(sides.hpcmlx, batch_size=size)) for size in (8, 32)
    }
    return report(runs_in_turn(rounds, variants), "8 rows a step")
