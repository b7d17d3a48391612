"""Picks the next token of every row from logits whose vocabulary is spread over ranks.

Only candidates and a logsumexp travel between ranks, never the logits. Randomness is a counter: the
noise of a row is a function of (seed, row, position, token id), so neither the layout nor the batch
a row happens to be in changes its draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from hpcmlx.inference.logprobs import Group, logsumexp
from hpcmlx.parallel.partition import Interval


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled. Truncation (top-k, top-p, min-p) looks at the untempered
    distribution, as in mlx-lm.

    Attributes:
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many, and those as likely as the last of them; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        seed: of the row's draws.
        max_tokens: stop after this many tokens.
        stop: strings that end the row; they are not part of its text.
        repetition_penalty: divides positive logits of tokens of the prompt and the answer, and
            multiplies negative ones (Keskar et al. 2019, "CTRL", section 4.1); 1 is none.
        frequency_penalty: subtracted once for each time the answer has the token already.
        presence_penalty: subtracted where the answer has the token already.
        logit_bias: (token, added to its logit).
        logprobs: None for none, else how many of the likeliest tokens to report beside the sampled.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    @property
    def truncates(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def looks_back(self) -> bool:
        """Whether the next token's logits depend on which tokens came before."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )


class Sampler:
    """Samples from logits of which this rank holds the vocabulary rows `interval`."""

    def __init__(self, group: Group, interval: Interval, vocab_size: int):
        self.group, self.vocab_size = group, vocab_size
        self.start, self.stop = interval

    def __call__(
        self, logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> mx.array:
        """The next token of every row, the same on every rank of the group.

        Args:
            logits: [rows, local vocab], any float dtype.
            params: one per row.
            positions: how many tokens each row has generated before this one.

        Returns:
            [rows] int32, unevaluated unless a row truncates the distribution.
        """
        logits = logits.astype(mx.float32)
        if any(p.truncates for p in params):
            floor = self._threshold(logits, params)
            logits = mx.where(logits >= floor[:, None], logits, -mx.inf)
        if any(p.temperature > 0 for p in params):
            logits = self._perturbed(logits, params, positions)
        return self._argmax(logits)

    def _argmax(self, scores: mx.array) -> mx.array:
        best = mx.argmax(scores, axis=-1).astype(mx.int32)
        if self.group.size == 1:
            return best
        value = mx.take_along_axis(scores, best[:, None], axis=-1)
        # Token ids travel as float32 beside the values: exact up to 2^24.
        candidate = mx.concatenate([value, (best[:, None] + self.start).astype(mx.float32)], axis=1)
        candidates = self.group.all_gather(candidate[None])  # [ranks, rows, 2]
        winner = mx.argmax(candidates[..., 0], axis=0)  # ties: the lower rank, the lower id
        return mx.take_along_axis(candidates[..., 1], winner[None], axis=0)[0].astype(mx.int32)

    def _perturbed(
        self, logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> mx.array:
        """logits / temperature + Gumbel noise: its argmax is a draw from the softmax
        (Maddison et al. 2014, "A* Sampling", section 2)."""
        rows = []
        for i, (p, position) in enumerate(zip(params, positions, strict=True)):
            if p.temperature == 0:
                rows.append(logits[i])
                continue
            # The whole vocabulary's noise, so that every layout sees the same numbers.
            noise = mx.random.gumbel((self.vocab_size,), key=noise_key(p.seed, position))
            rows.append(logits[i] / p.temperature + noise[self.start : self.stop])
        return mx.stack(rows)

    def _threshold(self, logits: mx.array, params: Sequence[SamplingParams]) -> mx.array:
        """[rows] the lowest logit that each row keeps."""
        count = max([64, *(p.top_k for p in params)])
        total = np.array(logsumexp(logits, self.group))
        while True:
            best, complete = self._top(logits, count)
            floors = [
                _row_threshold(p, row, z) for p, row, z in zip(params, best, total, strict=True)
            ]
            if complete or None not in floors:
                lowest = [best[i, -1] if f is None else f for i, f in enumerate(floors)]
                return mx.array(np.array(lowest, np.float32))
            count *= 8

    def _top(self, logits: mx.array, count: int) -> tuple[np.ndarray, bool]:
        """The largest `count` logits over all ranks, descending, and whether that is all."""
        local = min(count, logits.shape[-1])
        top = mx.topk(logits, local, axis=-1) if local < logits.shape[-1] else logits
        if self.group.size > 1 and local < count:  # ranks gather arrays of one shape
            top = mx.pad(top, [(0, 0), (0, count - local)], constant_values=-mx.inf)
        merged = self._gathered(top)  # [ranks, rows, count]
        merged = np.moveaxis(merged, 0, 1).reshape(logits.shape[0], -1)
        best = -np.sort(-merged, axis=-1)[:, : min(count, self.vocab_size)]
        return best, count >= self.vocab_size

    def _gathered(self, x: mx.array) -> np.ndarray:
        return np.array(self.group.all_gather(x[None]))


def _row_threshold(p: SamplingParams, best: np.ndarray, total: float) -> float | None:
    """The lowest logit a row keeps, or None when `best` does not reach far enough down.

    Args:
        best: the row's largest logits, descending.
        total: logsumexp over the whole vocabulary.
    """
    if not p.truncates:
        return -np.inf
    floor = -np.inf
    if p.top_k:
        floor = best[min(p.top_k, len(best)) - 1]
    if p.min_p > 0:
        floor = max(floor, best[0] + np.log(p.min_p))
    if p.top_p < 1:
        mass = np.cumsum(np.exp(best.astype(np.float64) - total))
        reached = int(np.searchsorted(mass, p.top_p))
        if reached == len(best):
            # Not reached among the candidates; another rule may already cut higher.
            return float(floor) if floor > best[-1] else None
        floor = max(floor, best[reached])
    return float(floor)


def noise_key(seed: int, position: int) -> mx.array:
    """The random key of one draw: 64 bits of a hash of (seed, position)."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return mx.array(np.frombuffer(digest, np.uint32))


def row_seed(seed: int, index: int) -> int:
    """The seed of the row at `index` of the input, where the row does not bring its own."""
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "big")
