"""What a row is on its way through a job: asked for, answered, or refused.

An input row that wants `n` samples is `n` requests, told apart by `sample`; everything after the
reader (engine, store) works with single samples, and `results.py` puts them together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcmlx.inference.logprobs import TokenLogprobs
from hpcmlx.inference.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """One sample of one input row: what to continue and how.

    Attributes:
        index: the row's position in the input, from 0; results come out in this order.
        id: the row's own id, else its line number.
        tokens: the prompt, at least one token.
        sample: which of the row's `n` samples this is, from 0.
    """

    index: int
    id: str
    tokens: Sequence[int]
    sampling: SamplingParams
    sample: int = 0


@dataclass(frozen=True)
class RowResult:
    """A finished sample.

    Attributes:
        text: the answer, without the stop string or the end token.
        tokens: every sampled token, the end token included.
        finish_reason: "stop" (end token or stop string) or "length".
        num_cached_tokens: prompt tokens that a shared prefix had computed already.
        ttft: seconds from the start of its prefill to its first token.
        seconds: from the start of its prefill to its end.
        created: when it ended, in seconds since 1970.
        rank: the world rank that recorded it.
        logprobs: one entry per token, where the row asked for them.
    """

    index: int
    id: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    ttft: float
    seconds: float
    sample: int = 0
    num_cached_tokens: int = 0
    created: float = 0.0
    rank: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from every other: (index, sample)."""
        return self.index, self.sample

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 where there is only one."""
        return (self.seconds - self.ttft) / (len(self.tokens) - 1) if len(self.tokens) > 1 else 0.0


@dataclass(frozen=True)
class RowError:
    """An input row that cannot be answered.

    Attributes:
        index: its position in the input, counted together with the good rows.
        id: its own id, else its line number.
        line: where it stands in the input file, from 1; None where the file has no lines.
        code: "invalid_json", "invalid_row", "context_length_exceeded", "chat_template_error".
        message: what is wrong and what to do.
    """

    index: int
    id: str
    line: int | None
    code: str
    message: str
