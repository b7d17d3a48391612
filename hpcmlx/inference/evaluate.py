"""Log-probabilities of a text under a model in any layout.

This is how perplexity is measured, and how layouts are compared with each other: the same text
gives the same numbers, up to rounding, however the model is spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import mlx.core as mx
import numpy as np

from hpcmlx.errors import InputError
from hpcmlx.files import write_hdf5
from hpcmlx.inference.logprobs import token_logprobs
from hpcmlx.inference.request import encode
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.parallel.link import StageLink


@dataclass(frozen=True)
class LogProbs:
    """What a text costs.

    Attributes:
        tokens: [n] int32, the text.
        logprobs: [n] float32, log p(token | the tokens before it in its window), in nats; NaN where
            nothing predicts a token: the first one, and every window's first without overlap.
    """

    tokens: np.ndarray
    logprobs: np.ndarray

    @property
    def num_predicted(self) -> int:
        return int(np.isfinite(self.logprobs).sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per predicted token, in nats."""
        return float(-np.nanmean(self.logprobs.astype(np.float64)))

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))


def read_text(path: str | Path, tokenizer: Any, max_tokens: int | None = None) -> list[int]:
    """The tokens of a UTF-8 text file, the first `max_tokens` of them.

    Raises:
        InputError: it cannot be read, or has fewer than two tokens.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"input {path} cannot be read: {error}") from None
    tokens = encode(tokenizer, text)[:max_tokens]
    if len(tokens) < 2:
        raise InputError(f"input {path} has {len(tokens)} tokens; scoring takes two at least")
    return tokens


def write_scores(run_dir: Path, scores: LogProbs, attributes: Mapping[str, Any]) -> None:
    """Write `logprobs.h5`: the token ids, their log-probabilities, and the perplexity."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("tokens", data=scores.tokens, chunks=True, fletcher32=True)
        file.create_dataset("logprobs", data=scores.logprobs, chunks=True, fletcher32=True)
        file["logprobs"].attrs["unit"] = "nat"
        file.attrs.update(attributes)
        file.attrs.update(perplexity=scores.perplexity, num_predicted=scores.num_predicted)

    write_hdf5(run_dir / "logprobs.h5", fill)


def score_tokens(
    loaded: LoadedModel,
    mesh: Mesh,
    tokens: Sequence[int],
    window: int,
    stride: int | None = None,
    batch_size: int = 1,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
) -> LogProbs | None:
    """Score a text in windows, dealt out over the replicas. Each token is scored once, in the first
    window that reaches it, so overlapping windows give it at least `window - stride` tokens of
    context.

    Args:
        tokens: the whole text, at least two tokens.
        window: tokens per window; a longer one gives each token more context.
        stride: tokens from one window's start to the next; None is `window` (no overlap).
        batch_size: full windows per forward pass.
        on_batch: told how many tokens each forward pass covered.

    Returns:
        On world rank 0 the scores, None elsewhere.
    """
    link, stage = StageLink(mesh, loaded.stage), loaded.stage
    stride = stride or window
    batches = _batches(len(tokens), window, stride, batch_size)
    mine: list[tuple[list[int], np.ndarray]] = []
    for batch in batches[mesh.dp :: mesh.dims.dp]:
        rows = mx.array([tokens[start : start + window] for start in batch], mx.int32)
        inputs = [] if stage.first else link.receive(*rows.shape)
        outputs = stage(rows, inputs, None)
        if stage.last:
            start = loaded.vocab_interval[0]
            scores = token_logprobs(outputs[:, :-1], rows[:, 1:], start, mesh.tp_group)
            mine.append((batch, np.array(scores)))
        else:
            mx.eval(outputs)
            link.send(outputs)
        on_batch(rows.size)
    link.flush()
    everything = mesh.world.gather(mine if mesh.is_last_stage and mesh.tp == 0 else [])
    if everything is None:
        return None
    logprobs = np.full(len(tokens), np.nan, np.float32)
    for batch, values in (part for parts in everything for part in parts):
        for start, row in zip(batch, values, strict=True):
            # What the window before has scored, with more context behind it, stays.
            first = start + window - stride if start else 1
            first = max(first, start + 1)
            logprobs[first : start + 1 + len(row)] = row[first - start - 1 :]
    return LogProbs(np.array(tokens, np.int32), logprobs)


def _batches(num_tokens: int, window: int, stride: int, batch_size: int) -> list[list[int]]:
    """Window starts, grouped so that the windows of a group have one length."""
    starts = [0]
    while starts[-1] + window < num_tokens:
        starts.append(starts[-1] + stride)
    full = [start for start in starts if start + window <= num_tokens]
    batches = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    # A window of a single token scores nothing.
    batches += [[start] for start in starts[len(full) :] if num_tokens - start > 1]
    return batches
