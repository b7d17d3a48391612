"""Penalties and bias: the logits that a row's past and its request change, and only those.

The sampler calls `adjust` before it looks at the logits. What a row has seen is counted once, token
by token, in its `Context`; a step touches the few logits concerned and costs nothing where no
row asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np


class Params(Protocol):
    """What is needed of `SamplingParams`."""

    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float

    @property
    def looks_back(self) -> bool: ...

    @property
    def bias(self) -> tuple[np.ndarray, np.ndarray] | None: ...


class Context:
    """The tokens that a row has seen, and how often its answer has each.

    Keep one per row, from its first token to its last: it holds on to `generated`, which the owner
    goes on appending to, and counts only what is new since it was last asked.
    """

    def __init__(self, prompt: Sequence[int], generated: Sequence[int]):
        self.prompt, self.generated = prompt, generated
        self._ids = np.unique(np.asarray(prompt, np.int32))
        self._counts = np.zeros(len(self._ids), np.float32)
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}
        self._num_counted = 0

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts): every token of prompt and answer once, int32, and how many times the
        answer has it, float32."""
        for token in self.generated[self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._grow()
            self._ids[place] = token
            self._counts[place] += 1
        self._num_counted = len(self.generated)
        size = len(self._places)
        return self._ids[:size], self._counts[:size]

    def _grow(self) -> None:
        room = 64 + len(self._ids) // 2
        self._ids = np.concatenate([self._ids, np.zeros(room, np.int32)])
        self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])


def adjust(
    logits: mx.array,
    params: Sequence[Params],
    contexts: Sequence[Context | None] | None,
    start: int,
) -> mx.array:
    """The logits after penalties, then bias.

    Repetition is over prompt and answer (Keskar et al. 2019, section 4.1); frequency and presence
    are over the answer and subtracted after it, as OpenAI's and vLLM's are.

    Args:
        logits: [rows, local vocab] float32: vocabulary rows from `start` on.
        contexts: one per row; may be None where the row does not look back.

    Returns:
        [rows, local vocab] float32; `logits` itself where no row asks for anything.

    Raises:
        ValueError: a row looks back and has no context.
    """
    if any(p.looks_back for p in params):
        logits = _penalised(logits, params, contexts or [None] * len(params), start)
    if any(p.bias is not None for p in params):
        logits = _biased(logits, params, start)
    return logits


def _penalised(
    logits: mx.array, params: Sequence[Params], contexts: Sequence[Context | None], start: int
) -> mx.array:
    width = logits.shape[1]
    positions, factors, terms = [], [], []
    for row, (p, context) in enumerate(zip(params, contexts, strict=True)):
        if not p.looks_back:
            continue
        if context is None:
            raise ValueError(f"row {row} has a penalty but no context")
        ids, counts = context.counts()
        if p.repetition_penalty == 1:  # then the prompt does not matter
            ids, counts = ids[counts > 0], counts[counts > 0]
        local = _local(ids, start, width)
        counts = counts[local]
        positions.append(ids[local] + (row * width - start))
        factors.append(np.full(len(counts), p.repetition_penalty, np.float32))
        terms.append(counts * p.frequency_penalty + (counts > 0) * p.presence_penalty)
    index = _index(positions)
    if index.size == 0:
        return logits
    factor = mx.array(np.concatenate(factors))
    term = mx.array(np.concatenate(terms).astype(np.float32))
    flat = logits.reshape(-1)
    old = flat[index]
    new = mx.where(old < 0, old * factor, old / factor) - term
    return mx.put_along_axis(flat, index, new, axis=0).reshape(logits.shape)


def _biased(logits: mx.array, params: Sequence[Params], start: int) -> mx.array:
    width = logits.shape[1]
    positions, terms = [], []
    for row, p in enumerate(params):
        if p.bias is not None:
            ids, values = p.bias
            local = _local(ids, start, width)
            positions.append(ids[local] + (row * width - start))
            terms.append(values[local])
    index = _index(positions)
    if index.size == 0:
        return logits
    return logits.reshape(-1).at[index].add(mx.array(np.concatenate(terms))).reshape(logits.shape)


def _local(ids: np.ndarray, start: int, width: int) -> np.ndarray:
    """Which of the ids are among this rank's vocabulary rows."""
    return (ids >= start) & (ids < start + width)


def _index(positions: list[np.ndarray]) -> mx.array:
    """Positions in the flattened logits."""
    return mx.array(np.concatenate(positions).astype(np.int32))
