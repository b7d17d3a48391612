"""Decode speed over the number of rows, and the two roofs over it: the model's matrix products
alone, and the reading of its weights alone.

Roofs are measured on the same weights in the same process. `hpcmlx.bench` runs this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from hpcmlx.bench.measure import Runner, in_turn
from hpcmlx.comm import Communicator
from hpcmlx.mesh import Mesh, ParallelDims

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def curve(model: str, rounds: int, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """Tokens per second of the engine and of the roofs.

    Returns:
        `batches`; by round and batch `engine` and `gemm`, in tokens per second; by round
        `read_seconds`, for all weights once; `weight_bytes`, of them.
    """
    runner = Runner(model, Mesh(ParallelDims(), Communicator()))
    weights = matrices(runner.loaded.stage.model)
    measurements: dict[str, Callable[[], float]] = {"read": lambda: _seconds_to_read(weights)}
    for batch in batches:
        measurements[f"engine {batch}"] = lambda batch=batch: runner.decode(batch)
        measurements[f"gemm {batch}"] = lambda batch=batch: (
            batch / _seconds_to_multiply(weights, batch)
        )
    series = in_turn(rounds, measurements)
    by_round = {
        side: list(zip(*(series[f"{side} {batch}"] for batch in batches), strict=True))
        for side in ("engine", "gemm")
    }
    return by_round | {
        "batches": list(batches),
        "read_seconds": series["read"],
        "weight_bytes": sum(weight.nbytes for weight in weights),
    }


def matrices(model: Any) -> list[mx.array]:
    """The weights that a decode step multiplies with, [out, in] each: every matrix of the model,
    the embedding only where it is the head as well."""
    found = dict(tree_flatten(model.parameters()))
    untied = any("lm_head" in name for name in found)
    return [
        weight
        for name, weight in found.items()
        if weight.ndim == 2 and not (untied and "embed_tokens" in name)
    ]


def _seconds_to_multiply(weights: Sequence[mx.array], rows: int) -> float:
    """A decode step of `rows` rows with nothing but its matrix products."""
    inputs = {width: mx.ones((rows, width)) for width in {weight.shape[1] for weight in weights}}
    mx.eval(list(inputs.values()))
    return _fastest(lambda: mx.eval([inputs[weight.shape[1]] @ weight.T for weight in weights]))


def _seconds_to_read(weights: Sequence[mx.array]) -> float:
    """All weights once through the processor, by the dot product of a BLAS."""
    flat = [np.array(weight, copy=False).reshape(-1) for weight in weights]
    return _fastest(lambda: [np.dot(array, array) for array in flat])


def _fastest(measure: Callable[[], Any], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        measure()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
