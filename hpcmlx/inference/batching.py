"""Whether a model can step rows of different lengths together.

Not every mlx-lm architecture can: gemma2's masks, for example, line up a batch of rows with its
key-value heads. The engine asks before it starts and runs such models row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from hpcmlx.parallel.pipeline import Stage

# More rows than shapes can confuse with a number of heads, and a prime.
_NUM_ROWS = 13

# Architectures whose shapes fit but whose numbers do not: no shape shows it, so they are named.
_WRONG_NUMBERS = {
    "afm7": "its last layers take a row's positions from the batch's padding",
    "minimax_m3_vl": "its sparse attention cuts a row's blocks along the batch's padding",
    "recurrent_gemma": "its recurrence treats a row without a state unlike one with zeros",
}


def merge_caches(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """One batch cache per cache entry, from the rows' own caches (mlx-lm's `merge`)."""
    return [entries[0].merge(list(entries)) for entries in zip(*rows, strict=True)]


def why_not_batched(stage: Stage) -> str | None:
    """Why this stage cannot step rows of different lengths together, or None if it can.

    A step of 13 rows is built but not evaluated: shapes that do not fit show up at once.
    """
    architecture = type(stage.model).__module__.rpartition(".")[2]
    if architecture in _WRONG_NUMBERS:
        return f"{architecture}: {_WRONG_NUMBERS[architecture]}"
    try:
        lengths = [1 + row % 3 for row in range(_NUM_ROWS)]
        caches = {length: stage.make_cache() for length in set(lengths)}
        for length, cache in caches.items():
            _step(stage, 1, length, cache)
        batch = merge_caches([caches[length] for length in lengths])
        outputs = _step(stage, _NUM_ROWS, 1, batch)
    except (ValueError, AttributeError, NotImplementedError, TypeError, IndexError) as error:
        return str(error).split("\n", 1)[0]
    if any(array.shape[0] != _NUM_ROWS for array in outputs):
        return f"{_NUM_ROWS} rows gave {outputs[0].shape[0]}"
    return None


def _step(stage: Stage, batch: int, length: int, cache: list[Any]) -> list[mx.array]:
    tokens = mx.zeros((batch, length), mx.int32)
    inputs = [mx.zeros(leaf.shape(batch, length), leaf.dtype) for leaf in stage.receives]
    outputs = stage(tokens, inputs, cache)
    return [outputs] if isinstance(outputs, mx.array) else outputs
