"""Picks the next token of every row from logits whose vocabulary is spread over ranks.

Only candidates and a logsumexp travel between ranks, never the logits. Randomness is a counter: the
noise of a row is a function of (seed, row, position, token id), so neither the layout nor the batch
a row happens to be in changes its draws. The engine calls `Sampler` once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from hpcmlx.inference.logprobs import Group, Report, gather_largest, logsumexp, merge_largest
from hpcmlx.inference.penalties import Context, adjust
from hpcmlx.parallel.partition import Interval

_NUM_CANDIDATES = 64  # of a row that truncates, before more are asked for


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled: penalties, then bias, then truncation and temperature. Truncation
    (top-k, top-p, min-p) looks at the penalised but untempered distribution, as in mlx-lm.

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

    @cached_property
    def bias(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`logit_bias` as arrays, ids int32 and values float32; None where there is none."""
        if not self.logit_bias:
            return None
        ids, values = zip(*self.logit_bias, strict=True)
        return np.array(ids, np.int32), np.array(values, np.float32)


class Sampler:
    """Samples from logits of which this rank holds the vocabulary rows `interval`."""

    def __init__(self, group: Group, interval: Interval, vocab_size: int):
        self.group, self.vocab_size = group, vocab_size
        self.start, self.stop = interval

    def __call__(
        self,
        logits: mx.array,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        contexts: Sequence[Context | None] | None = None,
    ) -> mx.array:
        """The next token of every row, the same on every rank of the group.

        A row is -1 instead, no token, where there is nothing to sample from: a NaN among its
        logits, or none that is finite. (With top-k, top-p or min-p as well as without.)

        Args:
            logits: [rows, local vocab], any float dtype.
            params: one per row.
            positions: how many tokens each row has generated before this one.
            contexts: one per row, where any row's `params` look back; it must have all tokens that
                the row has generated. The others may be None.

        Returns:
            [rows] int32, unevaluated unless a row truncates the distribution.

        Raises:
            ValueError: a row looks back and its context is missing or not up to date.
        """
        for position, context in zip(positions, contexts or (), strict=bool(contexts)):
            if context is not None and len(context.generated) != position:
                known = len(context.generated)
                raise ValueError(f"a context has {known} tokens, its row generated {position}")
        logits = adjust(logits.astype(mx.float32), params, contexts, self.start)
        kinds: dict[Callable[..., mx.array], list[int]] = {}
        for row, p in enumerate(params):
            kind = self._greedy
            if p.temperature > 0:
                kind = self._truncated if p.truncates else self._tempered
            kinds.setdefault(kind, []).append(row)
        # This rank's candidate for every row: [rows, 2], its score and its token.
        parts = [
            kind(
                logits if len(kinds) == 1 else logits[mx.array(rows)],
                [params[row] for row in rows],
                [positions[row] for row in rows],
            )
            for kind, rows in kinds.items()
        ]
        best = parts[0]
        if len(kinds) > 1:
            order = np.argsort(np.concatenate(list(kinds.values())))
            best = mx.concatenate(parts)[mx.array(order)]
        best = self.group.all_gather(best[None])  # [ranks, rows, 2]
        scores, tokens = best[..., 0], best[..., 1].astype(mx.int32)
        winner = mx.argmax(scores, axis=0, keepdims=True)  # ties: the lower rank, the lower id
        token = mx.take_along_axis(tokens, winner, axis=0)[0]
        # A NaN wins every mx.argmax (as of MLX 0.32.4), so it is seen here wherever it was.
        score = mx.take_along_axis(scores, winner, axis=0)[0]
        return mx.where(mx.isfinite(score), token, -1)

    def report(
        self, logits: mx.array, tokens: mx.array, params: Sequence[SamplingParams]
    ) -> Report | None:
        """Log-probabilities of the rows that ask for them, None where none does.

        Args:
            logits: [rows, local vocab], the same that `__call__` got.
            tokens: [rows] what it returned.
        """
        asked = [p.logprobs for p in params]
        if all(number is None for number in asked):
            return None
        return Report(logits, tokens, asked, self.start, self.vocab_size, self.group)

    def _greedy(
        self, logits: mx.array, _params: Sequence[SamplingParams], _positions: Sequence[int]
    ) -> mx.array:
        best = mx.argmax(logits, axis=-1, keepdims=True)
        return _candidates(logits, best, best + self.start)

    def _tempered(
        self, logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> mx.array:
        """logits / temperature + Gumbel noise: its argmax is a draw from the softmax
        (Maddison et al. 2014, "A* Sampling", section 2)."""
        # The whole vocabulary's draws, so that every layout sees the same numbers.
        uniform = mx.vmap(lambda key: mx.random.uniform(shape=(self.vocab_size,), key=key))
        draws = uniform(mx.array(noise_keys(params, positions)))[:, self.start : self.stop]
        scores = logits / _temperatures(params) - mx.log(-mx.log(draws))
        best = mx.argmax(scores, axis=-1, keepdims=True)
        return _candidates(scores, best, best + self.start)

    def _truncated(
        self, logits: mx.array, params: Sequence[SamplingParams], positions: Sequence[int]
    ) -> mx.array:
        """The same draw among the tokens that a row keeps: noise for these alone."""
        keys = noise_keys(params, positions)
        done, parts = [], []
        for rows, values, ids in self._kept(logits, params):
            draws = uniform_at(keys[rows], ids, self.vocab_size)
            temperatures = _temperatures([params[row] for row in rows])
            scores = mx.array(values) / temperatures - mx.log(-mx.log(draws))
            best = mx.argmax(scores, axis=-1, keepdims=True)
            tokens = mx.take_along_axis(mx.array(ids), best, axis=-1)
            parts.append(_candidates(scores, best, tokens))
            done.append(rows)
        return mx.concatenate(parts)[mx.array(np.argsort(np.concatenate(done)))]

    def _kept(
        self, logits: mx.array, params: Sequence[SamplingParams]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The tokens that rows may draw, for some rows at a time.

        Yields:
            rows: which ones, [n].
            values: [n, count] logits over all ranks, -inf for tokens that are not kept; they fall.
            ids: [n, count] int32, their tokens.
        """
        total = None
        if any(p.top_p < 1 for p in params):
            total = np.array(logsumexp(logits, self.group), np.float64)
        rows, count = np.arange(len(params)), max([_NUM_CANDIDATES, *(p.top_k + 1 for p in params)])
        while len(rows):
            part = logits if len(rows) == len(params) else logits[mx.array(rows)]
            gathered = gather_largest(part, count, self.start, self.group)
            values, ids = merge_largest(np.array(gathered), min(count, self.vocab_size))
            asking = [params[row] for row in rows]
            floors = _floors(values, None if total is None else total[rows], asking)
            # Enough, if not even a tie of the last one kept can be missing.
            enough = (floors > values[:, -1]) | ~np.isfinite(values[:, 0])
            enough |= count >= self.vocab_size
            if enough.any():
                # Not `values >= floor`, which would hide a NaN.
                kept = np.where(values < floors[:, None], np.float32(-np.inf), values)
                yield rows[enough], kept[enough], ids[enough]
            rows, count = rows[~enough], count * 8


def _candidates(scores: mx.array, best: mx.array, tokens: mx.array) -> mx.array:
    """[rows, 2] float32: the score at `best` and its token; ids are exact up to 2^24."""
    value = mx.take_along_axis(scores, best, axis=-1)
    return mx.concatenate([value, tokens.astype(mx.float32)], axis=1)


def _temperatures(params: Sequence[SamplingParams]) -> mx.array:
    return mx.array([p.temperature for p in params])[:, None]


def _floors(
    values: np.ndarray, total: np.ndarray | None, params: Sequence[SamplingParams]
) -> np.ndarray:
    """[rows] float32: the lowest logit that each row keeps, as far as `values` tell.

    Args:
        values: [rows, count] the row's largest logits, the largest first.
        total: [rows] logsumexp over the whole vocabulary; may be None where no row has a top-p.
    """
    floors = np.full(len(params), -np.inf)
    last = values.shape[1] - 1
    with np.errstate(divide="ignore", invalid="ignore"):  # log(0); rows that are not finite
        floors = np.maximum(floors, values[:, 0] + np.log([p.min_p for p in params]))
        top_k = np.array([p.top_k for p in params])
        lowest = values[np.arange(len(params)), np.clip(top_k - 1, 0, last)]
        floors = np.where(top_k > 0, np.maximum(floors, lowest), floors)
        if total is not None:
            top_p = np.array([p.top_p for p in params])
            mass = np.cumsum(np.exp(values - total[:, None]), axis=1)
            reached = (mass < top_p[:, None]).sum(axis=1)
            lowest = values[np.arange(len(params)), np.minimum(reached, last)]
            use = (top_p < 1) & (reached <= last)
            floors = np.where(use, np.maximum(floors, lowest), floors)
    return floors.astype(np.float32)


def noise_keys(params: Sequence[SamplingParams], positions: Sequence[int]) -> np.ndarray:
    """[rows, 2] uint32, the key of each row's draw: 64 bits of a hash of (seed, position)."""
    hashes = [
        blake2b(f"{p.seed}:{position}".encode(), digest_size=8).digest()
        for p, position in zip(params, positions, strict=True)
    ]
    return np.frombuffer(b"".join(hashes), np.uint32).reshape(-1, 2)


def uniform_at(keys: np.ndarray, ids: np.ndarray, vocab_size: int) -> mx.array:
    """What `mx.random.uniform(shape=(vocab_size,), key=key)` has at `ids`, without the rest.

    Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
    section 4.2); as in JAX, one hash gives the words i and i + vocab_size / 2.

    Args:
        keys: [rows, 2] uint32.
        ids: [rows, n] int32.

    Returns:
        [rows, n] float32 in (0, 1): a 0 would be a noise of -inf, and the only token a row keeps
        must not lose.
    """
    half = (vocab_size + 1) // 2
    first = np.where(ids < half, ids, ids - half).astype(np.uint32)
    second = np.where(first + half < vocab_size, first + half, 0).astype(np.uint32)
    schedule = [keys[:, :1], keys[:, 1:], keys[:, :1] ^ keys[:, 1:] ^ np.uint32(0x1BD11BDA)]
    x, y = first + schedule[0], second + schedule[1]
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x += y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y ^= x
        x += schedule[(i + 1) % 3]
        y += schedule[(i + 2) % 3] + np.uint32(i + 1)
    words = mx.array(np.where(ids < half, x, y))
    tiny, below_one = np.finfo(np.float32).tiny, np.nextafter(np.float32(1), np.float32(0))
    return mx.clip(words / mx.array(0xFFFFFFFF, mx.float32), mx.array(tiny), mx.array(below_one))


def row_seed(seed: int, index: int) -> int:
    """The seed of the row at `index` of the input, where the row does not bring its own."""
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "big")
