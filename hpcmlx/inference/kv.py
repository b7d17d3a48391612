"""What rows cost in KV-cache memory on every rank of a replica, and whether one more fits.

Costs are read off the stage's own caches, built but never evaluated, so a sliding window, a latent
attention or a recurrent state counts as what it is. All ranks know all costs and budgets and so
take the same decision. The engine is the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from hpcmlx.comm import Communicator
from hpcmlx.parallel.pipeline import Stage

STEP = 256  # positions by which mlx-lm's caches grow in advance


@dataclass(frozen=True)
class Load:
    """What takes cache memory at one moment: `rows` rows that come to `positions` tokens each.

    Attributes:
        prefill: their prompts are being fed; windows then hold a piece of prompt more.
    """

    rows: int
    positions: int
    prefill: bool = False


@dataclass(frozen=True)
class CacheCost:
    """Bytes that rows take on one rank.

    Attributes:
        fixed: of a row, whatever its length.
        per_position: of a row, for each position held.
        windows: (positions, bytes for each) of caches that hold no more than so many positions.
        piece: tokens of a prompt that are fed at once.
    """

    fixed: int
    per_position: int
    windows: tuple[tuple[int, int], ...] = ()
    piece: int = 0

    def __call__(self, load: Load) -> int:
        """Bytes of `load`, with the room that growing caches take in advance."""
        held = load.positions + STEP
        more = self.piece if load.prefill else 0
        windows = sum(min(held, limit + more) * size for limit, size in self.windows)
        return load.rows * (self.fixed + held * self.per_position + windows)


def measure_cost(
    stage: Stage, piece: int, convert: Callable[[list[Any]], list[Any]] = lambda caches: caches
) -> CacheCost:
    """The cost of a row on this stage. Nothing is evaluated.

    Args:
        piece: tokens of a prompt that are fed at once.
        convert: what happens to a row's caches before it decodes (8-bit KV).
    """
    short, long = (_sizes(convert(_filled(stage, n))) for n in (STEP, 2 * STEP))
    fixed = per_position = 0
    windows: dict[int, int] = {}
    for (limit, at_short), (_, at_long) in zip(short, long, strict=True):
        if limit is None:
            slope = (at_long - at_short) // STEP
            per_position += slope
            fixed += at_short - slope * STEP
        else:
            # A prompt of one piece is held whole, beyond the window, until the next step trims it.
            windows[limit] = windows.get(limit, 0) + at_short // STEP
    return CacheCost(fixed, per_position, tuple(sorted(windows.items())), piece)


def num_bytes(caches: Sequence[Any]) -> int:
    """Bytes that caches take now."""
    return sum(size for _, size in _sizes(caches))


def _filled(stage: Stage, length: int) -> list[Any]:
    """Unevaluated caches of a row after `length` tokens."""
    caches = stage.make_cache()
    tokens = mx.zeros((1, length), mx.int32)
    inputs = [mx.zeros(leaf.shape(1, length), leaf.dtype) for leaf in stage.receives]
    stage(tokens, inputs, caches)
    return caches


def _sizes(caches: Sequence[Any]) -> list[tuple[int | None, int]]:
    """(most positions or None, bytes now) of every cache, the parts of composed ones apart."""
    sizes = []
    for cache in caches:
        if parts := getattr(cache, "caches", None):
            sizes += _sizes(parts)
        else:
            size = 0 if cache.empty() else cache.nbytes
            sizes.append((getattr(cache, "max_size", None), size))
    return sizes


class Budget:
    """The cache memory of all ranks of a replica."""

    def __init__(self, replica: Communicator, cost: CacheCost, limit: int):
        """
        Args:
            cost: of a row on this rank.
            limit: bytes that this rank may use.
        """
        self.limit, self._rank = limit, replica.rank
        self._ranks: list[tuple[CacheCost, int]] = replica.allgather((cost, limit))

    def fits(self, loads: list[Load]) -> bool:
        """Whether all of `loads` together stay inside every rank's limit."""
        return all(sum(map(cost, loads)) <= limit for cost, limit in self._ranks)

    def bytes_of(self, loads: list[Load]) -> int:
        """What `loads` take on this rank."""
        cost, _ = self._ranks[self._rank]
        return sum(map(cost, loads))
