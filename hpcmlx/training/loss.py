"""The loss of a microbatch, over a vocabulary that is spread over ranks, in pieces of the sequence.

Logits are never gathered over the tensor-parallel ranks, and never whole along the sequence: a
piece's are computed, reduced to one number a token, dropped, and computed again in the backward
pass. `executor.py` is the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from hpcmlx.comm import Communicator
from hpcmlx.models.loader import LoadedModel
from hpcmlx.parallel.pipeline import Head
from hpcmlx.training.held import Held

_BLOCK = 256


def cross_entropy(logits: mx.array, tokens: mx.array, start: int, group: Communicator) -> mx.array:
    """-log p of each of `tokens`, differentiable.

    Every rank's gradient is that of its own logits: softmax minus one where the token is
    (Megatron-LM, arXiv:1909.08053, section 3, with the sums taken in blocks: MLX's own sum over a
    vocabulary of 49,152 is off by up to 2.5e-4).

    Args:
        logits: [..., local vocab]: vocabulary rows from `start` on.
        tokens: [...] ids in the whole vocabulary.

    Returns:
        [...] float32, in nats, the same on every rank of the group.
    """
    logits = logits.astype(mx.float32)
    highest = mx.stop_gradient(mx.max(logits, axis=-1))
    highest = mx.stop_gradient(mx.max(group.all_gather(highest[None]), axis=0))
    total = group.all_sum(_block_sum(mx.exp(logits - highest[..., None])))
    local = tokens - start
    inside = (local >= 0) & (local < logits.shape[-1])
    index = mx.where(inside, local, 0)[..., None]
    chosen = mx.take_along_axis(logits, index, axis=-1)[..., 0]
    chosen = group.all_sum(mx.where(inside, chosen, 0.0))
    return mx.log(total) + highest - chosen


def _block_sum(x: mx.array) -> mx.array:
    """Sum over the last axis, in blocks."""
    whole = x.shape[-1] // _BLOCK * _BLOCK
    parts = []
    if whole:
        parts.append(mx.sum(x[..., :whole].reshape(*x.shape[:-1], -1, _BLOCK), axis=-1))
    if whole < x.shape[-1]:
        parts.append(mx.sum(x[..., whole:], axis=-1, keepdims=True))
    return mx.sum(mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0], axis=-1)


class Loss:
    """The sum of -log p over the targets of a microbatch, from what the head receives."""

    def __init__(self, loaded: LoadedModel, head: Head, group: Communicator, chunk: int):
        """
        Args:
            group: tensor-parallel ranks, over which the vocabulary is spread.
            chunk: tokens whose logits are there at once, over all rows of the microbatch.
        """
        self._model, self._head, self._group = loaded.stage.model, head, group
        self._held: Held | None = None
        self._start, self._chunk = loaded.vocab_interval[0], chunk
        # What has no token axis of its own cannot be cut into pieces.
        self._pieces = all(
            leaf.fixed and len(leaf.dims) > 1 and leaf.dims[:2] == ((0, 1, 0), (0, 0, 1))
            for leaf in head.receives
        )

    def __call__(
        self,
        arrays: Sequence[mx.array],
        tokens: mx.array,
        targets: mx.array,
        trained: Mapping[str, mx.array],
    ) -> mx.array:
        """
        Args:
            arrays: what the head receives.
            tokens: [batch, seq] ids.
            targets: [batch, seq] bool: which tokens are to be predicted, from the one before.
            trained: the head's own trained parameters. They have to come in as arguments: through
                a checkpoint nothing else gets a gradient.

        Returns:
            float32 scalar, not divided by anything.
        """
        batch, length = tokens.shape
        step = max(1, self._chunk // batch) if self._pieces else length
        if self._held is None or self._held.names != tuple(trained):
            self._held = Held(self._model, tuple(trained))
        held = self._held

        def piece(where: tuple[mx.array, mx.array, mx.array], parts: list[mx.array]) -> mx.array:
            now, following, wanted = where

            def sum_of(parameters: list[mx.array], arrays: list[mx.array]) -> mx.array:
                with held(parameters):
                    logits = self._head(now, arrays)
                nll = cross_entropy(logits, following, self._start, self._group)
                return mx.sum(mx.where(wanted, nll, 0.0))

            return mx.checkpoint(sum_of)(list(trained.values()), parts)

        total = mx.zeros(())
        following = mx.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)  # the last is no target
        wanted = mx.concatenate([targets[:, 1:], mx.zeros((batch, 1), mx.bool_)], axis=1)
        for start in range(0, length, step):
            cut = slice(start, start + step)
            parts = [a[:, cut] for a in arrays] if self._pieces else list(arrays)
            where = (tokens[:, cut], following[:, cut], wanted[:, cut])
            total = total + piece(where, parts)
        return total
