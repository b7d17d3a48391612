"""The caches of rows that step together: one batch cache per cache entry of the stage.

A slot has places. A row that joins takes over the place of one that has ended, in place, so that
nothing of the other rows is copied; mlx-lm's own `extend` and `filter` copy them all. The engine is
the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import BatchKVCache

from hpcmlx.parallel.pipeline import Stage

# More rows than shapes can confuse with a number of heads, and a prime.
_NUM_ROWS = 13
# Positions of padding that every row has before the caches are cut: one copy for so many steps.
_SLACK = 16

# Architectures whose shapes fit but whose numbers do not: no shape shows it, so they are named.
_WRONG_NUMBERS = {
    "afm7": "its last layers take a row's positions from the batch's padding",
    "minimax_m3_vl": "its sparse attention cuts a row's blocks along the batch's padding",
    "recurrent_gemma": "its recurrence treats a row without a state unlike one with zeros",
}


class SlotCaches:
    """Batch caches with places for rows.

    Attributes:
        lengths: tokens in each place; an ended row's place keeps counting until it is taken over.
        entries: mlx-lm's batch caches, one per cache entry of the stage; of a model whose rows
            cannot step together the only row's own caches.
    """

    def __init__(self, rows: Sequence[list[Any]], lengths: Sequence[int], *, batched: bool):
        self.lengths = list(lengths)
        self.entries = merge_caches(rows) if batched else rows[0]

    @property
    def positions(self) -> int:
        """How far the caches are filled, padding included."""
        return max([entry._idx for entry in self._kv], default=max(self.lengths))

    @property
    def _kv(self) -> list[BatchKVCache]:
        """The entries, or parts of them, that hold every position."""
        return [entry for entry in _parts(self.entries) if isinstance(entry, BatchKVCache)]

    def step(self) -> None:
        """All rows are about to be fed one token."""
        self._cut_padding()
        self.lengths = [length + 1 for length in self.lengths]

    def take_over(
        self, places: Sequence[int], rows: Sequence[list[Any]], lengths: Sequence[int]
    ) -> None:
        """Put new rows into `places`, whose rows have ended."""
        for place, length in zip(places, lengths, strict=True):
            self.lengths[place] = length
        joining = merge_caches(rows)
        for i, (entry, new) in enumerate(zip(self.entries, joining, strict=True)):
            self.entries[i] = _take_over(entry, list(places), new)
        self._evaluate_padding()

    def append(self, rows: Sequence[list[Any]], lengths: Sequence[int]) -> None:
        """New places behind the others."""
        for entry, new in zip(self.entries, merge_caches(rows), strict=True):
            entry.extend(new)
        self.lengths += lengths
        self._evaluate_padding()

    def keep(self, places: Sequence[int]) -> None:
        """Only these places are left, in this order."""
        index = mx.array(list(places))
        for entry in self.entries:
            entry.filter(index)
        self.lengths = [self.lengths[place] for place in places]
        self._evaluate_padding()

    def _evaluate_padding(self) -> None:
        """Models build their mask from one layer's cache: the padding of the others, which nobody
        reads, would stay a graph that grows with every row that joins."""
        mx.async_eval([entry.left_padding for entry in self._kv])

    def _cut_padding(self) -> None:
        """Where every row is padded by much, cut that off."""
        cut = self.positions - max(self.lengths)
        if cut < _SLACK:
            return
        for entry in self._kv:
            entry.keys, entry.values = tree_map(
                lambda x: x[..., cut:, :], (entry.keys, entry.values)
            )
            entry.left_padding = mx.maximum(entry.left_padding - cut, 0)
            entry._idx -= cut


def _parts(entries: Sequence[Any]) -> list[Any]:
    """The entries with composed ones (`CacheList`) taken apart."""
    return [part for entry in entries for part in getattr(entry, "caches", (entry,))]


def _take_over(entry: Any, places: list[int], new: Any) -> Any:
    """`entry` with the rows of `new` in `places`."""
    if parts := getattr(entry, "caches", None):
        entry.caches = type(parts)(
            _take_over(part, places, other) for part, other in zip(parts, new.caches, strict=True)
        )
        return entry
    if isinstance(entry, BatchKVCache) and entry.keys is not None and new.keys is not None:
        _write_rows(entry, places, new)
        return entry
    # In a ring buffer the rows' tokens do not line up: join behind, then move to the places.
    size = entry.offset.shape[0] if hasattr(entry, "offset") else entry.batch_size
    order = list(range(size))
    for i, place in enumerate(places):
        order[place] = size + i
    entry.extend(new)
    entry.filter(mx.array(order))
    return entry


def _write_rows(entry: BatchKVCache, places: list[int], new: BatchKVCache) -> None:
    """Write the rows of `new` over those of `entry`, right-aligned at the position reached."""
    missing = new._idx - entry._idx
    if missing > 0:  # the new rows are longer than anything here: make room in front
        entry.keys, entry.values = tree_map(
            lambda x: mx.pad(x[..., : entry._idx, :], [(0, 0), (0, 0), (missing, 0), (0, 0)]),
            (entry.keys, entry.values),
        )
        entry.left_padding = entry.left_padding + missing
        entry._idx += missing
    begin = entry._idx - new._idx
    # A slice of one row is written where it stands; an index array would copy everything.
    for old, rows in zip(_arrays(entry), _arrays(new), strict=True):
        for i, place in enumerate(places):
            old[place : place + 1, :, begin : entry._idx] = rows[i : i + 1, :, : new._idx]
    index = mx.array(places)
    entry.left_padding[index] = new.left_padding + begin
    entry.offset[index] = new.offset


def merge_caches(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """One batch cache per cache entry, from the rows' own caches (mlx-lm's `merge`)."""
    return [entries[0].merge(list(entries)) for entries in zip(*rows, strict=True)]


def _arrays(entry: BatchKVCache) -> list[mx.array]:
    """The arrays that hold its keys and values, [rows, heads, positions, …] each."""
    return [array for _, array in tree_flatten((entry.keys, entry.values))]


def fork_caches(caches: Sequence[Any], count: int = 1) -> list[Any]:
    """The caches of `count` rows that begin alike, from those of one, which stay as they are."""

    def fork(x: mx.array) -> mx.array:
        # A new handle at least: caches assign into slices of theirs.
        return x[...] if count == 1 else mx.repeat(x, count, axis=0)

    return [_map_arrays(cache, fork) for cache in caches]


def split_caches(caches: Sequence[Any], count: int) -> list[list[Any]]:
    """The caches of each of `count` rows of one length that were prefilled together."""
    if count == 1:
        return [list(caches)]
    return [
        [_map_arrays(cache, lambda x, i=i: x[i : i + 1]) for cache in caches] for i in range(count)
    ]


def _map_arrays(cache: Any, function: Callable[[mx.array], mx.array]) -> Any:
    """A copy of a cache with `function` applied to each of its arrays."""
    if parts := getattr(cache, "caches", None):
        new = copy.copy(cache)
        new.caches = type(parts)(_map_arrays(part, function) for part in parts)
        return new
    new = copy.copy(cache)
    new.state = tree_map(lambda x: function(x) if isinstance(x, mx.array) else x, cache.state)
    return new


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
