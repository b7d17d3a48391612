"""Normalisers, log-probabilities and largest logits of a vocabulary that is spread over ranks.

`evaluate.py` scores texts with them, `sampling.py` finds candidates and reports with every token
how likely it and its rivals were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import mlx.core as mx
import numpy as np

_BLOCK = 256
_NO_ID = float(1 << 24)  # above every token id: ids travel as float32, exact up to here


class Group(Protocol):
    """The tensor-parallel ranks that share a vocabulary."""

    @property
    def size(self) -> int: ...

    def all_sum(self, x: mx.array) -> mx.array: ...

    def all_gather(self, x: mx.array) -> mx.array: ...


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities, in nats, of one sampled token and of the likeliest ones at its place.

    They are the model's own: before penalties, bias, temperature and truncation.

    Attributes:
        logprob: of the token that was sampled.
        top: (token, logprob), the likeliest first, of equals the lower id; as many as were asked
            for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logsumexp(logits: mx.array, group: Group) -> mx.array:
    """logsumexp over the whole vocabulary, in float32: one number a row travels.

    Summed in blocks. MLX's own adds a row up in a few running sums, which on a vocabulary of 49,152
    is wrong by up to 2.5e-4, more than everything else in a forward pass together.

    Args:
        logits: [..., local vocab].

    Returns:
        [...].
    """
    return mx.logsumexp(group.all_gather(_local_logsumexp(logits)[None]), axis=0)


def _local_logsumexp(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    whole = logits.shape[-1] // _BLOCK * _BLOCK
    parts = []
    if whole:
        blocks = logits[..., :whole].reshape(*logits.shape[:-1], -1, _BLOCK)
        parts.append(mx.logsumexp(blocks, axis=-1))
    if whole < logits.shape[-1]:
        parts.append(mx.logsumexp(logits[..., whole:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)


def token_logprobs(logits: mx.array, tokens: mx.array, start: int, group: Group) -> mx.array:
    """log p of each of `tokens`.

    Args:
        logits: [..., local vocab]: vocabulary rows from `start` on.
        tokens: [...] ids in the whole vocabulary.

    Returns:
        [...] float32, the same on every rank of the group.
    """
    return group.all_sum(_local_logit(logits, tokens, start)) - logsumexp(logits, group)


def _local_logit(logits: mx.array, tokens: mx.array, start: int) -> mx.array:
    """The logit of each token, in float32; 0 where another rank holds it."""
    local = tokens - start
    inside = (local >= 0) & (local < logits.shape[-1])
    index = mx.where(inside, local, 0)[..., None]
    chosen = mx.take_along_axis(logits, index, axis=-1)[..., 0].astype(mx.float32)
    return mx.where(inside, chosen, 0.0)


def largest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest logits of every row, of equal ones those with the lower ids.

    A NaN counts as larger than every number, so that it cannot go unseen.

    Args:
        logits: [rows, vocab] float32.

    Returns:
        (values, ids), each [rows, count] (all of them where there are fewer), in no order.
    """
    num_rows, width = logits.shape
    ids = mx.arange(width)[None]
    if count >= width:
        return logits, mx.broadcast_to(ids, logits.shape)
    # The largest are in the `count` blocks with the largest maxima. That leaves little to sort.
    size = isqrt(width // count)
    if size >= 4:
        padding = [(0, 0), (0, -width % size)]
        blocks = mx.pad(logits, padding, constant_values=-mx.inf).reshape(num_rows, -1, size)
        maxima = mx.max(blocks, axis=-1)
        chosen = _largest_at(maxima, mx.arange(maxima.shape[1])[None], count)[..., None]
        logits = mx.take_along_axis(blocks, chosen, axis=1).reshape(num_rows, -1)
        ids = (chosen * size + mx.arange(size)).reshape(num_rows, -1)
    index = _largest_at(logits, ids, count)
    ids = mx.broadcast_to(ids, logits.shape)
    return mx.take_along_axis(logits, index, axis=-1), mx.take_along_axis(ids, index, axis=-1)


def _largest_at(values: mx.array, ids: mx.array, count: int) -> mx.array:
    """Where in each row the `count` largest values are, by whole numbers that have no ties."""
    bits = (values + 0.0).view(mx.int32)  # + 0.0: of two zeros neither is the larger
    order = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of the floats
    order = mx.where(mx.isnan(values), 0x7FFFFFFF, order).astype(mx.int64)
    keys = order * mx.array(1 << 32, mx.int64) - ids.astype(mx.int64)
    return mx.argpartition(keys, -count, axis=-1)[:, -count:].astype(mx.int32)


def gather_largest(
    logits: mx.array, count: int, start: int, group: Group, columns: Sequence[mx.array] = ()
) -> mx.array:
    """What `merge_largest` needs of every rank, in one collective.

    Args:
        logits: [rows, local vocab] float32: vocabulary rows from `start` on.
        columns: [rows] each, to travel along.

    Returns:
        [ranks, rows, len(columns) + 2 * count] float32, unevaluated.
    """
    values, ids = largest(logits, count)
    ids = (ids + start).astype(mx.float32)
    if (missing := count - values.shape[1]) > 0:  # ranks gather arrays of one shape
        values = mx.pad(values, [(0, 0), (0, missing)], constant_values=-mx.inf)
        ids = mx.pad(ids, [(0, 0), (0, missing)], constant_values=_NO_ID)
    packed = mx.concatenate([*(column[:, None] for column in columns), values, ids], axis=1)
    return group.all_gather(packed[None])


def merge_largest(gathered: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest logits over all ranks: (values, ids), each [rows, count], the largest
    first (NaN before all), of equals the lower id.

    Args:
        gathered: [ranks, rows, 2 * n] float32, as `gather_largest` gives it without columns.
    """
    by_row = np.moveaxis(gathered, 0, 1)
    values, ids = (half.reshape(len(by_row), -1) for half in np.split(by_row, 2, axis=2))
    falling = np.where(np.isnan(values), -np.inf, -values)
    order = np.lexsort((ids, falling), axis=-1)[:, :count]
    values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
    return values, ids.astype(np.int32)


class Report:
    """How likely one step's tokens were, under way.

    `arrays` are to be evaluated together with the tokens, on every rank of the group; `read` may
    follow any time later, on the ranks that want to know.
    """

    def __init__(
        self,
        logits: mx.array,
        tokens: mx.array,
        asked: Sequence[int | None],
        start: int,
        vocab_size: int,
        group: Group,
    ):
        """
        Args:
            logits: [rows, local vocab], the model's own: vocabulary rows from `start` on.
            tokens: [rows] int32, those that were sampled.
            asked: per row, how many of the likeliest tokens to tell; None for nothing at all.
        """
        self._asked = asked
        rows = [row for row, number in enumerate(asked) if number is not None]
        if len(rows) < len(asked):
            logits, tokens = logits[mx.array(rows)], tokens[mx.array(rows)]
        logits = logits.astype(mx.float32)
        columns = [_local_logsumexp(logits), _local_logit(logits, tokens, start)]
        self._count = min(max(asked[row] or 0 for row in rows), vocab_size)
        if self._count:
            self._gathered = gather_largest(logits, self._count, start, group, columns)
        else:
            self._gathered = group.all_gather(mx.stack(columns, axis=1)[None])

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate with the tokens."""
        return [self._gathered]

    def read(self) -> list[TokenLogprobs | None]:
        """One entry per row, None where nothing was asked. Without meaning for a row whose token
        is -1."""
        gathered = np.array(self._gathered)
        values, ids = merge_largest(gathered[..., 2:], self._count)
        with np.errstate(invalid="ignore"):  # rows that are not finite
            totals = np.logaddexp.reduce(gathered[..., 0].astype(np.float64), axis=0)
            # Rounding must not make a probability larger than 1.
            chosen = np.minimum(gathered[..., 1].sum(axis=0) - totals, 0.0).tolist()
            tops = np.minimum(values - totals[:, None], 0.0).tolist()
        rows = iter(zip(chosen, ids.tolist(), tops, strict=True))
        return [None if number is None else _entry(*next(rows), number) for number in self._asked]


def _entry(logprob: float, ids: list[int], top: list[float], number: int) -> TokenLogprobs:
    return TokenLogprobs(logprob, tuple(zip(ids[:number], top[:number], strict=True)))
