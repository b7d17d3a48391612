"""Attention that stays inside documents, for rows that are packed with several.

mlx-lm's models ask their caches for masks. In training there is nothing to cache, so what they are
handed here looks like an empty cache and makes masks of documents.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from hpcmlx.errors import ConfigError


class DocumentCache:
    """Stands where a KV cache does, holds nothing and hides other documents.

    Positions need no reset: rotary embeddings are relative.
    """

    offset = 0

    def __init__(self, visible: mx.array, window: int | None):
        self._visible, self._window = visible, window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What is there: nothing was kept."""
        return keys, values

    def make_mask(
        self, length: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        """[batch, 1, length, length] bool: causal, inside the document and the window."""
        window = window_size or self._window
        if window is None or window >= length:
            return self._visible
        places = mx.arange(length)
        return self._visible & (places[:, None] < places[None] + window)


def document_caches(model: nn.Module, segments: mx.array) -> list[DocumentCache]:
    """One for every entry of the model's cache list.

    Args:
        segments: [batch, seq] number of the document of each token; 0 is padding.

    Raises:
        ConfigError: the model keeps more than keys and values, e.g. the state of a recurrence,
            which would run on from one document into the next.
    """
    fresh = make_prompt_cache(model)
    length = segments.shape[1]
    causal = mx.tril(mx.ones((length, length), mx.bool_))
    visible = causal & (segments[:, None, :, None] == segments[:, None, None, :])
    return [DocumentCache(visible, _window(model, cache)) for cache in fresh]


def _window(model: nn.Module, cache: Any) -> int | None:
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and not cache.keep:
        return cache.max_size
    raise ConfigError(
        f"train.packing: {getattr(model, 'model_type', type(model).__name__)} keeps a "
        f"{type(cache).__name__}, which would carry one document into the next; "
        "set train.packing=false"
    )
