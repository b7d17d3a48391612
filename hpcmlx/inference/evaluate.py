"""Log-probabilities and perplexity of a text under a model in any layout.

This is also how layouts are compared with each other: the same text gives the same numbers, up to
rounding, however the model is spread. jobs/evaluate.py runs `TextEvaluation`, or one of the other
kinds, which lie in choices.py and harness.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from hpcmlx.errors import ConfigError, ExitCode, InputError
from hpcmlx.files import write_hdf5
from hpcmlx.inference.scoring import ScoreRow, score
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.models.tokenizer import encode
from hpcmlx.observe.progress import ProgressBar
from hpcmlx.redact import written
from hpcmlx.settings import EvaluateConfig


@dataclass(frozen=True)
class Verdict:
    """How an evaluation ended.

    Attributes:
        totals: its numbers, for summary.json.
        line: the same for people.
        num_tokens: that the model has computed; None where they were not counted.
        code: ROW_ERRORS where some rows of the input could not be used.
    """

    totals: dict[str, Any]
    line: str
    code: ExitCode = ExitCode.OK
    num_tokens: int | None = None


class Evaluation(Protocol):
    """A kind of evaluation. What is wrong with its input it says when it is made, before the model
    loads."""

    def __init__(self, cfg: EvaluateConfig, mesh: Mesh, tokenizer: Any, context: int | None): ...

    def run(self, loaded: LoadedModel, run_dir: Path) -> Verdict | None:
        """Collective: evaluate, and write the files; the verdict on world rank 0."""


def source_of(cfg: EvaluateConfig, mesh: Mesh) -> dict[str, Any]:
    """What an evaluation's files say of where they come from, as it was written."""
    return {
        "model": written("model.path", cfg.model.path, cfg.unresolved),
        "layout": str(mesh.dims),
        "input": written("input", cfg.input, cfg.unresolved),
    }


class TextEvaluation:
    """`evaluate.kind=text`: the log-probability of every token of a file.

    Args:
        context: tokens that the model can see at once, if it says.

    Raises:
        InputError: the file cannot be used.
        ConfigError: the windows are longer than the context.
    """

    def __init__(self, cfg: EvaluateConfig, mesh: Mesh, tokenizer: Any, context: int | None):
        self.cfg, self.mesh = cfg, mesh
        tokens = None
        if mesh.world.rank == 0:
            tokens = read_text(cfg.input, tokenizer, cfg.evaluate.max_tokens)
        self.tokens: list[int] = mesh.world.bcast(tokens)
        self.window = min(cfg.evaluate.window, len(self.tokens))
        self.stride = min(cfg.evaluate.stride, self.window)
        if context is not None and self.window > context:
            raise ConfigError(
                f"evaluate.window={cfg.evaluate.window} is more than the model's context of "
                f"{context}; lower it"
            )

    def run(self, loaded: LoadedModel, run_dir: Path) -> Verdict | None:
        """Score the text and write `logprobs.h5`; the verdict on world rank 0."""
        windows = _windows(len(self.tokens), self.window, self.stride)
        total = sum(stop - first for _, first, stop in windows)
        with ProgressBar(total, "tokens", enabled=self.mesh.world.rank == 0) as bar:
            scores = score_tokens(
                loaded,
                self.mesh,
                self.tokens,
                self.window,
                self.stride,
                self.cfg.inference.batch_size,
                bar.advance,
            )
        if scores is None:
            return None
        settings = {"window": self.window, "stride": self.stride}
        source = source_of(self.cfg, self.mesh)
        write_scores(run_dir, scores, source | settings)
        totals = {
            "tokens": scores.num_predicted,
            "perplexity": scores.perplexity,
            "nats_per_token": scores.nll,
        }
        line = (
            f"{scores.num_predicted} tokens, perplexity {scores.perplexity:.4f} "
            f"({scores.nll:.5f} nats a token)"
        )
        return Verdict(totals | settings, line, num_tokens=scores.num_predicted)


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
        return int(np.count_nonzero(~np.isnan(self.logprobs)))

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
        batch_size: windows per forward pass, at most.
        on_batch: told how many tokens have been scored since it was told before.

    Returns:
        On world rank 0 the scores, None elsewhere.
    """
    windows = _windows(len(tokens), window, stride or window)
    rows = [ScoreRow(tokens[start:stop], first - start) for start, first, stop in windows]
    scores = score(
        loaded,
        mesh,
        rows,
        batch_size=batch_size,
        on_rows=lambda done: on_batch(sum(len(row.tokens) - row.start for row in done)),
    )
    if scores is None:
        return None
    logprobs = np.full(len(tokens), np.nan, np.float32)
    for (_, first, stop), one in zip(windows, scores, strict=True):
        logprobs[first:stop] = one.logprobs
    return LogProbs(np.array(tokens, np.int32), logprobs)


def _windows(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first, stop) of each window tokens[start:stop] that scores tokens[first:stop]."""
    windows = []
    start = stop = 0
    while stop < num_tokens:
        # What the window before has scored, with more context behind it, stays.
        first, stop = max(stop, start + 1), min(start + window, num_tokens)
        if first < stop:
            windows.append((start, first, stop))
        start += stride
    return windows
