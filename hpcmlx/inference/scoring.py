"""Log-probabilities of given tokens on any layout; perplexity, choices and lm-eval ask for them.

The stages and links are those of generation, without caches. Rows stand padded on the right in
microbatches: nothing that a causal model computes for a token depends on what comes after it. The
same microbatches go through every layout, because their size decides how products are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hpcmlx.errors import InputError, IntegrityError
from hpcmlx.flight import recorder
from hpcmlx.inference.logprobs import Group, token_logprobs
from hpcmlx.inference.request import max_context
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.parallel.link import StageLink

#: Tokens of a microbatch, padding included; a longer row is one by itself.
BATCH_TOKENS = 2048
_BLOCK = 1 << 26  # logits that are worked on at a time: 256 MiB in float32


@dataclass(frozen=True)
class ScoreRow:
    """Asks for log p(tokens[i] | tokens[:i]) of every i from `start` on.

    Raises:
        ValueError: `start` is not one of the tokens, or is the first, which nothing predicts.
    """

    tokens: Sequence[int]
    start: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.tokens):
            raise ValueError(f"start={self.start} of a row of {len(self.tokens)} tokens")


@dataclass(frozen=True)
class Score:
    """What a row costs.

    Attributes:
        logprobs: [len(tokens) - start] float32, in nats.
        is_greedy: whether each of these tokens is the likeliest at its place.
    """

    logprobs: np.ndarray
    is_greedy: bool

    @property
    def total(self) -> float:
        """log p of all the tokens together."""
        return float(self.logprobs.sum(dtype=np.float64))


@dataclass(frozen=True)
class _Batch:
    rows: tuple[int, ...]  # positions in the list of rows
    length: int  # of the longest, without its last token, which predicts nothing


def score(
    loaded: LoadedModel,
    mesh: Mesh,
    rows: Sequence[ScoreRow],
    *,
    batch_size: int = 32,
    batch_tokens: int = BATCH_TOKENS,
    on_rows: Callable[[Sequence[ScoreRow]], None] = lambda rows: None,
) -> list[Score] | None:
    """Score rows of any lengths, dealt out over the replicas, the longest first. Collective.

    A microbatch's logits, [tokens, local vocab], are held whole in the model's number format; what
    is worked on in float32 is a part of them of bounded size.

    Args:
        rows: the same on every rank.
        batch_size: rows of a microbatch, at most.
        batch_tokens: tokens of a microbatch, at most, padding included.
        on_rows: told after each round which rows all the replicas have been through; the replicas
            get rows of equal cost and are taken to keep pace.

    Returns:
        On world rank 0 one score per row, in their order; None elsewhere.

    Raises:
        InputError: a row is longer than the model's context.
        IntegrityError: the model gives NaN.
    """
    _check_lengths(rows, max_context(loaded.config))
    batches = _batches([len(row.tokens) - 1 for row in rows], batch_size, batch_tokens)
    link, dims = StageLink(mesh, loaded.stage), mesh.dims
    mine: dict[int, Score] = {}
    for number, first in enumerate(range(0, len(batches), dims.dp), 1):
        together = batches[first : first + dims.dp]
        if mesh.dp < len(together):
            batch = together[mesh.dp]
            chosen = [rows[i] for i in batch.rows]
            tokens, targets = _arrays(chosen, batch.length)
            recorder.step = number
            logits = link.forward(tokens)
            if logits is not None:
                scores = _scores(chosen, logits, targets, loaded, mesh.tp_group)
                mine.update(zip(batch.rows, scores, strict=True))
            if number % dims.pp == 0:
                link.flush()  # a fast stage is not to run away and fill the memory with messages
        on_rows([rows[i] for batch in together for i in batch.rows])
    link.flush()
    parts = mesh.world.gather(mine if mesh.is_last_stage and mesh.tp == 0 else {})
    if parts is None:
        return None
    done = {i: score for part in parts for i, score in part.items()}
    for i in range(len(rows)):
        if np.isnan(done[i].logprobs).any():
            raise IntegrityError(
                f"the model gives NaN for row {i} of {len(rows)}: its weights are damaged, or its "
                "numbers too big for the format; try model.dtype=float32"
            )
    return [done[i] for i in range(len(rows))]


def _check_lengths(rows: Sequence[ScoreRow], context: int | None) -> None:
    longest = max((len(row.tokens) for row in rows), default=0)
    if context is not None and longest - 1 > context:  # the last token is not an input
        raise InputError(
            f"a row of {longest} tokens is longer than the model's context of {context}; shorten it"
        )


def _batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[_Batch]:
    """The rows in microbatches, the longest first. No layout comes into it: how many rows a matrix
    product has decides its rounding."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches, at = [], 0
    while at < len(order):
        longest = lengths[order[at]]
        size = max(1, min(batch_size, batch_tokens // longest))
        batches.append(_Batch(tuple(order[at : at + size]), longest))
        at += size
    return batches


def _arrays(rows: Sequence[ScoreRow], length: int) -> tuple[mx.array, mx.array]:
    """Inputs and targets [rows, length] int32: each row without its last and its first token."""
    tokens = np.zeros((len(rows), length + 1), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
    return mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])


def _scores(
    rows: Sequence[ScoreRow],
    logits: mx.array,
    targets: mx.array,
    loaded: LoadedModel,
    group: Group,
) -> list[Score]:
    """The scores of a microbatch from its logits [rows, length, local vocab]."""
    num_rows, length, _ = logits.shape
    # By the whole vocabulary: ranks may hold unequal parts of it but must take equal steps.
    step = max(1, _BLOCK // (num_rows * loaded.vocab_size))
    vocab_start = loaded.vocab_interval[0]
    logprobs = np.zeros((num_rows, length), np.float32)
    greedy = np.zeros((num_rows, length), bool)
    for begin in range(min(row.start for row in rows) - 1, length, step):
        part = slice(begin, begin + step)
        chosen = token_logprobs(logits[:, part], targets[:, part], vocab_start, group)
        best = _argmax(logits[:, part], vocab_start, group)
        logprobs[:, part] = np.array(chosen)
        greedy[:, part] = np.array(best == targets[:, part])
    scores = []
    for i, row in enumerate(rows):
        own = slice(row.start - 1, len(row.tokens) - 1)
        scores.append(Score(logprobs[i, own].copy(), bool(greedy[i, own].all())))
    return scores


def _argmax(logits: mx.array, vocab_start: int, group: Group) -> mx.array:
    """[...] int32, the likeliest token of the whole vocabulary: one candidate a rank travels."""
    best = mx.argmax(logits, axis=-1, keepdims=True).astype(mx.int32)
    value = mx.take_along_axis(logits, best, axis=-1).astype(mx.float32)
    # Token ids travel as float32 beside the values: exact up to 2^24.
    candidate = mx.concatenate([value, (best + vocab_start).astype(mx.float32)], axis=-1)
    candidates = group.all_gather(candidate[None])
    winner = mx.argmax(candidates[..., 0], axis=0)  # ties: the lower rank, the lower id
    return mx.take_along_axis(candidates[..., 1], winner[None], axis=0)[0].astype(mx.int32)
