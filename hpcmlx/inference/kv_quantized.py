"""KV caches in 8 bits for rows that step together; mlx-lm has them for a single row only.

A row's own cache is quantized after each piece of its prompt (mlx-lm's `QuantizedKVCache`); here is
the batch that such rows join. Caches of other kinds (windows, recurrent states) stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from hpcmlx.errors import ConfigError


class RowQuantizedKVCache(QuantizedKVCache):
    """mlx-lm's cache of one row, which can join a batch. `group_size` is None while it is empty."""

    def __init__(self, bits: int):
        super().__init__(group_size=None, bits=bits)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.group_size = self.group_size or group_size(keys, values, self.bits)
        return super().update_and_fetch(keys, values)

    @staticmethod
    def merge(caches: list[QuantizedKVCache]) -> BatchQuantizedKVCache:
        return BatchQuantizedKVCache.merge(caches)

    def size(self) -> int:
        return self.offset


class BatchQuantizedKVCache(BatchKVCache):
    """mlx-lm's `BatchKVCache` whose keys and values are each packed: (values, scales, biases)."""

    def __init__(self, left_padding: list[int], bits: int, group_size: int | None):
        super().__init__(left_padding)
        self.bits, self.group_size = bits, group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.group_size = self.group_size or group_size(keys, values, self.bits)
        new = [mx.quantize(x, group_size=self.group_size, bits=self.bits) for x in (keys, values)]
        end = self._idx + keys.shape[2]
        if self.keys is None or end > self.keys[0].shape[2]:
            room = -(-keys.shape[2] // self.step) * self.step
            self.keys, self.values = tree_map(
                lambda x: mx.pad(x, [(0, 0), (0, 0), (0, room), (0, 0)]), self._held(new)
            )
        for held, arrays in zip((self.keys, self.values), new, strict=True):
            for old, part in zip(held, arrays, strict=True):
                old[..., self._idx : end, :] = part
        self.offset = self.offset + keys.shape[2]
        self._idx = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        return tree_map(lambda x: x[..., : self._idx, :], (self.keys, self.values))

    def _held(self, like: Any) -> Any:
        """Keys and values so far; of a cache without any, arrays `like` others with no positions
        but for its padding."""
        if self.keys is not None:
            return self.keys_and_values()
        rows = self.offset.shape[0]
        return tree_map(
            lambda x: mx.zeros((rows, x.shape[1], self._idx, x.shape[3]), x.dtype), like
        )

    def filter(self, batch_indices: mx.array) -> None:
        if self.keys is not None:
            self.keys, self.values = tree_map(lambda x: x[batch_indices], (self.keys, self.values))
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]

    def extend(self, other: BatchQuantizedKVCache) -> None:
        reached = max(self._idx, other._idx)
        like = next(((c.keys, c.values) for c in (self, other) if c.keys is not None), None)
        if like is not None:
            parts = [_shifted(c._held(like), reached - c._idx) for c in (self, other)]
            self.keys, self.values = tree_map(lambda a, b: mx.concatenate([a, b]), *parts)
        self.left_padding = mx.concatenate(
            [c.left_padding + (reached - c._idx) for c in (self, other)]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        self.group_size = self.group_size or other.group_size
        self._idx = reached

    @classmethod
    def merge(cls, caches: Sequence[QuantizedKVCache]) -> BatchQuantizedKVCache:
        longest = max(cache.offset for cache in caches)
        padding = [longest - cache.offset for cache in caches]
        filled = next((cache for cache in caches if not cache.empty()), None)
        merged = cls(padding, caches[0].bits, filled and filled.group_size)
        if filled is not None:
            like = filled.keys_and_values()
            rows = [
                tree_map(lambda x: x[..., :0, :], like) if c.empty() else c.keys_and_values()
                for c in caches
            ]
            shifted = [_shifted(row, by) for row, by in zip(rows, padding, strict=True)]
            merged.keys, merged.values = tree_map(lambda *x: mx.concatenate(x), *shifted)
        merged.offset = merged.offset + longest
        merged._idx = longest
        return merged

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for part in (self.keys or (), self.values or ()) for x in part)


def _shifted(arrays: Any, by: int) -> Any:
    """Arrays [rows, heads, positions, …] with `by` positions of padding in front."""
    return tree_map(lambda x: mx.pad(x, [(0, 0), (0, 0), (by, 0), (0, 0)]), arrays)


def group_size(keys: mx.array, values: mx.array, bits: int) -> int:
    """How many numbers share a scale.

    Raises:
        ConfigError: the heads are of a width that cannot be packed.
    """
    widths = (keys.shape[-1], values.shape[-1])
    for size in (64, 32):
        if all(width % size == 0 for width in widths):
            return size
    raise ConfigError(
        f"inference.kv_bits={bits}: this model's heads are {widths[0]} wide, not a multiple of 32; "
        "leave it null"
    )


def quantize_caches(caches: list[Any], bits: int) -> list[Any]:
    """The caches of rows with those that hold every position packed; others as they are."""
    return [_quantized(cache, bits) if type(cache) is KVCache else cache for cache in caches]


def _quantized(cache: KVCache, bits: int) -> RowQuantizedKVCache:
    packed = RowQuantizedKVCache(bits)
    if not cache.empty():
        size = group_size(cache.keys, cache.values, bits)
        packed.state = cache.to_quantized(group_size=size, bits=bits).state
        # Lists: mlx-lm assigns into the arrays' slices.
        packed.keys, packed.values = list(packed.keys), list(packed.values)
    return packed
