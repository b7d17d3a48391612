"""KV caches in 8 bits for rows that step together; mlx-lm has them for a single row only.

A row's own cache is quantized after each piece of its prompt (mlx-lm's `QuantizedKVCache`); here is
the batch that such rows join. Caches of other kinds (windows, recurrent states) stay as they are.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from hpcmlx.errors import ConfigError


class RowQuantizedKVCache(QuantizedKVCache):
    """mlx-lm's cache of one row, which can join a batch."""

    @staticmethod
    def merge(caches: list[QuantizedKVCache]) -> BatchQuantizedKVCache:
        return BatchQuantizedKVCache.merge(caches)

    def size(self) -> int:
        return self.offset


class BatchQuantizedKVCache(BatchKVCache):
    """mlx-lm's `BatchKVCache` whose keys and values are each a packed (values, scales, biases)."""

    def __init__(self, left_padding: list[int], group_size: int, bits: int):
        super().__init__(left_padding)
        self.group_size, self.bits = group_size, bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        new = [mx.quantize(x, group_size=self.group_size, bits=self.bits) for x in (keys, values)]
        end = self._idx + keys.shape[2]
        if self.keys is None or end > self.keys[0].shape[2]:
            room = -(-keys.shape[2] // self.step) * self.step

            def grow(old: mx.array | None, like: mx.array) -> mx.array:
                empty = mx.zeros((*like.shape[:2], room, like.shape[3]), like.dtype)
                return (
                    empty
                    if old is None
                    else mx.concatenate([old[..., : self._idx, :], empty], axis=2)
                )

            held = (self.keys or (None,) * 3, self.values or (None,) * 3)
            self.keys, self.values = (
                tuple(map(grow, old, like)) for old, like in zip(held, new, strict=True)
            )
        for held_arrays, arrays in zip((self.keys, self.values), new, strict=True):
            for old, part in zip(held_arrays, arrays, strict=True):
                old[..., self._idx : end, :] = part
        self.offset = self.offset + keys.shape[2]
        self._idx = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        return tree_map(lambda x: x[..., : self._idx, :], (self.keys, self.values))

    def filter(self, batch_indices: mx.array) -> None:
        self.keys, self.values = tree_map(lambda x: x[batch_indices], (self.keys, self.values))
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]

    def extend(self, other: BatchQuantizedKVCache) -> None:
        reached = max(self._idx, other._idx)

        def aligned(cache: BatchQuantizedKVCache) -> tuple[Any, Any]:
            missing = reached - cache._idx
            return tree_map(
                lambda x: mx.pad(x, [(0, 0), (0, 0), (missing, 0), (0, 0)]), cache.keys_and_values()
            )

        self.keys, self.values = tree_map(
            lambda a, b: mx.concatenate([a, b]), aligned(self), aligned(other)
        )
        self.left_padding, self.offset = (
            mx.concatenate([a + (reached - self._idx) * pad, b + (reached - other._idx) * pad])
            for a, b, pad in (
                (self.left_padding, other.left_padding, 1),
                (self.offset, other.offset, 0),
            )
        )
        self._idx = reached

    @classmethod
    def merge(cls, caches: list[QuantizedKVCache]) -> BatchQuantizedKVCache:
        longest = max(cache.offset for cache in caches)
        padding = [longest - cache.offset for cache in caches]
        merged = cls(padding, caches[0].group_size, caches[0].bits)
        merged.keys, merged.values = tree_map(
            lambda *parts: mx.concatenate(
                [
                    mx.pad(x, [(0, 0), (0, 0), (missing, 0), (0, 0)])
                    for x, missing in zip(parts, padding, strict=True)
                ]
            ),
            *(cache.keys_and_values() for cache in caches),
        )
        merged.offset = merged.offset + longest
        merged._idx = longest
        return merged

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for part in (self.keys, self.values) for x in part)


def quantize_caches(caches: list[Any], bits: int) -> list[Any]:
    """The caches of a row with those that hold every position packed; others as they are."""
    return [_quantized(cache, bits) for cache in caches]


def _quantized(cache: Any, bits: int) -> Any:
    if type(cache) is not KVCache or cache.empty():
        return cache
    widths = (cache.keys.shape[-1], cache.values.shape[-1])
    group = next((g for g in (64, 32) if all(width % g == 0 for width in widths)), None)
    if group is None:
        raise ConfigError(
            f"inference.kv_bits={bits}: this model's heads are {widths[0]} wide, not a multiple of "
            "32; leave it null"
        )
    packed = cache.to_quantized(group_size=group, bits=bits)
    own = RowQuantizedKVCache(group, bits)
    own.state = packed.state
    # Tuples of handles of their own: mlx-lm assigns into their slices.
    own.keys, own.values = list(own.keys), list(own.values)
    return own
