"""The single-process truth that every layout is compared with: mlx-lm's own model and decoding.

Tolerances: 1e-4 on log-probabilities in float32, where reordered sums of a few hundred terms differ
by some 1e-6 and 30 layers amplify that; greedy tokens must be equal unless the two best
candidates are within 1e-3, where rounding may pick either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model as mlx_lm_load

LOGPROB_TOLERANCE = 1e-4
NEAR_TIE = 1e-3


def save_checkpoint(model: nn.Module, config: dict[str, Any], path: Path) -> Path:
    """Write a model as a checkpoint directory."""
    path.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def load_twin(path: Path) -> nn.Module:
    return mlx_lm_load(Path(path))[0]


def twin_logprobs(model: nn.Module, tokens: Sequence[int], window: int) -> np.ndarray:
    """log p of every token given those before it in its window; NaN for each window's first."""
    result = np.full(len(tokens), np.nan, np.float32)
    for start in range(0, len(tokens), window):
        part = mx.array([list(tokens[start : start + window])])
        if part.shape[1] < 2:
            continue
        logits = np.array(model(part)[0, :-1].astype(mx.float32)).astype(np.float64)
        # In float64: mx.logsumexp over a big vocabulary is off by more than the tolerance.
        total = np.logaddexp.reduce(logits, axis=-1)
        chosen = logits[np.arange(len(logits)), np.array(part[0, 1:])]
        result[start + 1 : start + part.shape[1]] = chosen - total
    return result


def twin_greedy(
    model: nn.Module, prompt: Sequence[int], max_tokens: int
) -> tuple[list[int], np.ndarray]:
    """mlx-lm's greedy tokens and, per token, how far the best logprob is above the second."""
    tokens, gaps = [], []
    for token, logprobs in generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens):
        tokens.append(int(token))
        best = np.sort(np.array(logprobs.astype(mx.float32)))[-2:]
        gaps.append(best[1] - best[0])
    return tokens, np.array(gaps)


def assert_same_greedy(
    ours: Sequence[int], twin: Sequence[int], gaps: np.ndarray, label: str
) -> None:
    """Equal tokens, or the first difference is at a near tie of the twin."""
    for i, (a, b) in enumerate(zip(ours, twin, strict=False)):
        if a != b:
            assert gaps[i] < NEAR_TIE, f"{label}: token {i} is {a}, the twin says {b}"
            return
    assert len(ours) == len(twin), f"{label}: {len(ours)} tokens, the twin gave {len(twin)}"


class NumberTokenizer:
    """A tokenizer for models without one: a token's text is its number and a space."""

    def __init__(self, eos_token_ids: Sequence[int] = ()):
        self.eos_token_ids = set(eos_token_ids)

    @property
    def detokenizer(self) -> Any:
        return _NumberDetokenizer()


class _NumberDetokenizer:
    def __init__(self) -> None:
        self.text = ""

    def add_token(self, token: int) -> None:
        self.text += f"{token} "

    def finalize(self) -> None:
        pass
