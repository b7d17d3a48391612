"""Normalisers and log-probabilities over a vocabulary that is spread over ranks."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

_BLOCK = 256


class Group(Protocol):
    """The tensor-parallel ranks that share a vocabulary."""

    @property
    def size(self) -> int: ...

    def all_sum(self, x: mx.array) -> mx.array: ...

    def all_gather(self, x: mx.array) -> mx.array: ...


def logsumexp(logits: mx.array, group: Group) -> mx.array:
    """logsumexp over the whole vocabulary, in float32: one number a row travels.

    Summed in blocks. MLX's own adds a row up in a few running sums, which on a vocabulary of 49,152
    is wrong by up to 2.5e-4, more than everything else in a forward pass together.

    Args:
        logits: [..., local vocab].

    Returns:
        [...].
    """
    logits = logits.astype(mx.float32)
    whole = logits.shape[-1] // _BLOCK * _BLOCK
    parts = []
    if whole:
        blocks = logits[..., :whole].reshape(*logits.shape[:-1], -1, _BLOCK)
        parts.append(mx.logsumexp(blocks, axis=-1))
    if whole < logits.shape[-1]:
        parts.append(mx.logsumexp(logits[..., whole:], axis=-1, keepdims=True))
    local = mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)
    return mx.logsumexp(group.all_gather(local[None]), axis=0)


def token_logprobs(logits: mx.array, tokens: mx.array, start: int, group: Group) -> mx.array:
    """log p of each of `tokens`.

    Args:
        logits: [..., local vocab]: vocabulary rows from `start` on.
        tokens: [...] ids in the whole vocabulary.

    Returns:
        [...] float32, the same on every rank of the group.
    """
    local = tokens - start
    inside = (local >= 0) & (local < logits.shape[-1])
    index = mx.where(inside, local, 0)[..., None]
    chosen = mx.take_along_axis(logits, index, axis=-1)[..., 0].astype(mx.float32)
    return group.all_sum(mx.where(inside, chosen, 0.0)) - logsumexp(logits, group)
