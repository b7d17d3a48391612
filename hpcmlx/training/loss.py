"""The loss of a microbatch, over a vocabulary that is spread over ranks, in pieces.

Only positions that predict a target have logits at all. They are never gathered over the
tensor-parallel ranks, and never all there: those of a piece are computed, reduced to one number a
token and to the gradient of that number, and dropped. So the backward pass finds the gradients of
what the head has received, and computes nothing twice. `executor.py` is the caller.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from hpcmlx.comm import Communicator
from hpcmlx.models.loader import LoadedModel
from hpcmlx.parallel.pipeline import Head
from hpcmlx.training.held import Held

_BLOCK = 256

_log = logging.getLogger(__name__)


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
    total = _block_sum(mx.exp(logits - highest[..., None]))
    local = tokens - start
    inside = (local >= 0) & (local < logits.shape[-1])
    index = mx.where(inside, local, 0)[..., None]
    chosen = mx.take_along_axis(logits, index, axis=-1)[..., 0]
    # In one sum: of two that do not wait for each other ranks may do another one first.
    total, chosen = group.all_sum(mx.stack([total, mx.where(inside, chosen, 0.0)]))
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
        if not self._pieces:
            _log.warning(
                "%s: what its head takes cannot be cut into tokens: logits are whole, "
                "train.loss_chunk has no effect",
                loaded.config["model_type"],
            )

    def __call__(
        self,
        arrays: Sequence[mx.array],
        tokens: mx.array,
        targets: mx.array,
        trained: Mapping[str, mx.array],
        *,
        gradients: bool = True,
    ) -> mx.array:
        """
        Args:
            arrays: what the head receives.
            tokens: [batch, seq] ids.
            targets: [batch, seq] bool: which tokens are to be predicted, from the one before;
                evaluated.
            trained: the head's own trained parameters. They have to come in as arguments: nothing
                else gets a gradient.
            gradients: whether it is to be differentiated; if so, evaluating the loss computes the
                gradients too.

        Returns:
            float32 scalar, not divided by anything.
        """
        if self._held is None or self._held.names != tuple(trained):
            self._held = Held(self._model, tuple(trained))
        held, count = self._held, len(trained)
        pieces, arrays = self._cut(arrays, tokens, targets)
        if not pieces:
            return mx.zeros(())

        def sum_of(piece: _Piece, values: Sequence[mx.array]) -> mx.array:
            with held(values[:count]):
                logits = self._head(piece.tokens, values[count:])
            nll = cross_entropy(logits, piece.following, self._start, self._group)
            return mx.sum(nll if piece.wanted is None else mx.where(piece.wanted, nll, 0.0))

        values = [*trained.values(), *arrays]
        if not gradients:
            total = mx.zeros(())
            for piece in pieces:
                total = total + sum_of(piece, _after([total], [*values[:count], *piece.of(arrays)]))
            return total

        @mx.custom_function
        def with_gradients(values: list[mx.array]) -> list[mx.array]:
            parameters, arrays = values[:count], values[count:]
            total = mx.zeros(())
            sums = [mx.zeros_like(parameter) for parameter in parameters]
            parts: list[list[mx.array]] = [[] for _ in arrays]
            for piece in pieces:
                before = [total, *sums, *(gradient for part in parts for gradient in part[-1:])]
                given = _after(before, [*parameters, *piece.of(arrays)])
                (own,), found = mx.vjp(
                    lambda *now, piece=piece: [sum_of(piece, now)], given, [mx.ones(())]
                )
                total = total + own
                sums = [a + b for a, b in zip(sums, found, strict=False)]
                for part, gradient in zip(parts, found[count:], strict=True):
                    part.append(gradient)
            sums += [mx.concatenate(p, axis=1) if len(p) > 1 else p[0] for p in parts]
            return [*mx.depends([total], sums), *sums]

        @with_gradients.vjp
        def _(_: object, cotangents: list[mx.array], made: list[mx.array]) -> list[mx.array]:
            return [(cotangents[0] * gradient).astype(gradient.dtype) for gradient in made[1:]]

        made: Any = with_gradients(values)
        loss: mx.array = made[0]
        return loss

    def _cut(
        self, arrays: Sequence[mx.array], tokens: mx.array, targets: mx.array
    ) -> tuple[list[_Piece], list[mx.array]]:
        """The pieces, and what they are pieces of: `arrays` at the positions before targets, in
        one row."""
        batch, length = tokens.shape
        wanted = np.zeros((batch, length), bool)
        wanted[:, :-1] = np.array(targets)[:, 1:]
        following = mx.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)  # the last is no target
        places = np.flatnonzero(wanted)
        if not len(places):
            return [], []
        if not self._pieces:
            return [_Piece(tokens, following, mx.array(wanted), None)], list(arrays)
        index = mx.array(places.astype(np.uint32))
        rows = [a.reshape(1, batch * length, *a.shape[2:])[:, index] for a in arrays]
        now, following = (a.reshape(1, -1)[:, index] for a in (tokens, following))
        cuts = [slice(at, at + self._chunk) for at in range(0, len(places), self._chunk)]
        return [_Piece(now[:, cut], following[:, cut], None, cut) for cut in cuts], rows


@dataclass(frozen=True)
class _Piece:
    """Positions whose logits are there at once.

    Attributes:
        tokens, following: [batch, length] the ids there, and those that come next.
        wanted: [batch, length] which of the latter are targets; None: all of them.
        cut: which part of the row of all positions it is; None: everything.
    """

    tokens: mx.array
    following: mx.array
    wanted: mx.array | None
    cut: slice | None

    def of(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Its part of `arrays`."""
        return list(arrays) if self.cut is None else [a[:, self.cut] for a in arrays]


def _after(before: list[mx.array], arrays: list[mx.array]) -> list[mx.array]:
    """`arrays`, computed when `before` is: the logits of one piece are gone before the next."""
    later: list[mx.array] = mx.depends(arrays, before)
    return later
